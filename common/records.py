"""
Rows of an evaluation on disk: one JSON line per answer, written batch by batch, so that a killed
run goes on where it was. The first line is not a row: it holds the settings.

`keep_compact` makes rows.jsonl.gz of rows.jsonl: no texts, and yet all that the tables are made of.
"""
import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path

from common import parallel
from common.cli import Alone, InputError, reading, say
from common.files import start_files, weight_files, write_bytes
from common.report import shared_prefix


# What the table is made of; what a compact row does without
NEEDED = {"id", "strategy", "batch", "batch_rows", "tokens", "chunks", "finish", "seconds",
          "prompt_seconds", "correct", "correct_strict", "start_loss"}
TEXTS = {"text", "extracted", "extracted_strict", "gold"}


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
    """The JSON objects in a file of lines, from line `first` on, each with the keys `needed`. What
    ends in .gz is unpacked.

    A last line without its end, which a killed run was writing, is left out; so is any damaged one,
    with a note. (Two processes may write to one file: behind what one of them could not finish the
    other one goes on.)
    """
    with reading(path):
        data = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"not a whole gzip file: {error}") from None
        lines = data.decode("utf-8").split("\n")[:-1]
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


def compact(row, plain):
    """A row without its texts, a third of the size; a row that is compact already comes as it is.

    plain     k = 1's row for the same question, not compact either
    returns   a dict: `tokens` is their number, `hash` tells different ones apart, `shared_prefix`
              is how many of the first ones are k = 1's
    """
    tokens = row["tokens"]
    if isinstance(tokens, int):
        return row
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    return {key: value for key, value in row.items() if key not in TEXTS} | {
        "tokens": len(tokens), "hash": digest[:8],
        "shared_prefix": shared_prefix(tokens, plain["tokens"])}


def keep_compact(path, plain):
    """Write rows.jsonl.gz beside a finished rows.jsonl: the settings, and every row `compact`.

    plain   the name of the strategy k = 1
    """
    settings = next(json_lines(path, set()))
    rows = [row for batch in read_rows(path).values() for row in batch]
    references = {row["id"]: row for row in rows if row["strategy"] == plain}
    kept = [settings, *(compact(row, references[row["id"]]) for row in rows)]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    # without the date that gzip notes: the same rows are the same file
    write_bytes(path.with_suffix(".jsonl.gz"), gzip.compress(lines.encode(), mtime=0))


def open_rows(path, settings, header, resume):
    """The file of rows, with an earlier run's whole batches in it, open to append; for all ranks.

    settings   what a resumed run must have in common with the one before, a dict
    header     command, commit and machine; the first line has those of every piece of the work

    Raises InputError if the file exists without --resume, holds other settings, or is being written
    by another program.
    """
    lock = Alone(path.parent) if parallel.rank_and_world()[0] == 0 else None
    kept, pieces = {}, [header]
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
        kept, pieces = read_rows(path), [*was.get("pieces", []), header]
    # Every rank writes the new file: where the disk refuses, all stop, and none waits for others
    temporary = path.with_suffix(f".tmp{parallel.rank_and_world()[0]}")
    with open(temporary, "w", encoding="utf-8") as file:
        rows = (row for batch in kept.values() for row in batch)
        for row in [settings | {"pieces": pieces}, *rows]:
            file.write(json.dumps(row) + "\n")
    parallel.wait()                                 # until all have looked whether there is one
    temporary.replace(path)
    parallel.wait()                                 # what is appended from now on stays
    # A batch fits this buffer and goes out as one write: no other rank gets between its rows
    file = open(path, "a", buffering=2 ** 26, encoding="utf-8")
    file.lock = lock                                # ours as long as the file is open
    return file
