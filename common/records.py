"""
Rows of an evaluation on disk: one JSON line per answer, written batch by batch, so that a killed
run goes on where it was. The first line is not a row: it holds the settings.
"""
import hashlib
import json
import os
from pathlib import Path

from common import parallel
from common.cli import Alone, InputError, reading, say
from common.files import start_files, weight_files


# What the table is made of
NEEDED = {"id", "strategy", "batch", "batch_rows", "tokens", "chunks", "finish", "seconds",
          "prompt_seconds", "correct", "correct_strict", "start_loss"}


def fingerprint(folder):
    """Tells checkpoints apart: `hash_of` the weights of a model, of adapters, or of both."""
    adapters = Path(folder) / "adapters" / "adapter_model.safetensors"
    if not adapters.exists():
        return hash_of(weight_files(folder))
    return hash_of([file for file in start_files(folder) if file.suffix != ".json"] + [adapters])


def hash_of(files):
    """Over name, size, first and last megabyte of files of weights: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            digest.update(f"{file.name} {size}".encode() + handle.read(2 ** 20))
            handle.seek(-min(2 ** 20, size), os.SEEK_END)
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def json_lines(path, needed, first=1):
    """The JSON objects in a file of lines, from line `first` on, each with the keys `needed`.

    A last line without its end, which a killed run was writing, is left out; so is any damaged one,
    with a note. (Two processes may write to one file: behind what one of them could not finish the
    other one goes on.)
    """
    with reading(path):
        lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(lines[first - 1:], first):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not row.keys() >= needed:
                raise ValueError
            yield row
        except (ValueError, RecursionError):
            say(f"note: {path}:{number} is damaged and left out")


def read_rows(path):
    """{(strategy, batch): its rows} of the whole batches in `path`."""
    kept = {}
    with reading(path):
        for row in json_lines(path, NEEDED, first=2):
            kept.setdefault((row["strategy"], row["batch"]), []).append(row)
        return {key: batch for key, batch in kept.items() if len(batch) == batch[0]["batch_rows"]}


def open_rows(path, settings, resume):
    """The file of rows, with an earlier run's whole batches in it, open to append; for all ranks.

    Raises InputError if the file exists without --resume, holds other settings, or is being written
    by another program.
    """
    lock = Alone(path.parent) if parallel.rank_and_world()[0] == 0 else None
    kept = {}
    if path.exists():
        was = next(json_lines(path, settings.keys()), {})
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
    file = open(path, "a", buffering=2 ** 26, encoding="utf-8")
    file.lock = lock                                # ours as long as the file is open
    return file
