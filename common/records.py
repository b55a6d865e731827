"""
Rows of an evaluation on disk: one JSON line per answer, written batch by batch, so that a killed
run goes on where it was. The first line is not a row: it holds the settings.
"""
import hashlib
import json
import os
from pathlib import Path

from common import parallel
from common.cli import InputError
from common.files import weight_files


def fingerprint(folder):
    """Tells checkpoints apart: a hash over name, size, first and last megabyte of weight files."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size = file.stat().st_size
        with open(file, "rb") as handle:
            digest.update(f"{file.name} {size}".encode() + handle.read(2 ** 20))
            handle.seek(-min(2 ** 20, size), os.SEEK_END)
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def read_rows(path):
    """{(strategy, batch): its rows} of the whole batches in `path`."""
    kept = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines()[1:]:
        try:
            row = json.loads(line)
        except ValueError:                              # the line that a killed run was writing
            continue
        kept.setdefault((row["strategy"], row["batch"]), []).append(row)
    return {key: batch for key, batch in kept.items() if len(batch) == batch[0]["batch_rows"]}


def open_rows(path, settings, resume):
    """The file of rows, with an earlier run's whole batches in it, open to append; for all ranks.

    Raises InputError if the file exists without --resume, or holds other settings.
    """
    kept = {}
    if path.exists():
        with open(path, encoding="utf-8") as file:
            was = json.loads(file.readline() or "{}")
        for key, value in settings.items():
            if was.get(key) != value:
                had = f"{key} {was.get(key)}, not {value}"
                if key in ("checkpoint", "baseline"):               # hashes, which tell nothing
                    had = f"another {key}"
                raise InputError(f"{path} exists, made with {had}: choose another --out")
        if not resume:
            raise InputError(f"{path} exists: add --resume to go on, or choose another --out")
        kept = read_rows(path)
    # Every rank writes the new file: where the disk refuses, all stop, and none waits for others
    temporary = path.with_suffix(f".tmp{parallel.rank_and_world()[0]}")
    with open(temporary, "w", encoding="utf-8") as file:
        for row in [settings, *(row for batch in kept.values() for row in batch)]:
            file.write(json.dumps(row) + "\n")
    parallel.wait()                                 # until all have looked whether there is one
    temporary.replace(path)
    parallel.wait()                                 # what is appended from now on stays
    # A batch fits this buffer and goes out as one write: no other rank gets between its rows
    return open(path, "a", buffering=2 ** 26, encoding="utf-8")
