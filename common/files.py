"""
Files: JSON, safetensors, and writing so that a file under its final name is always whole.

    from common.files import new_folder, read_json, read_weights, write_json
"""
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.cli import InputError, writing


# --------------------------------------------------------------------------------------------------
# Reading

def read_json(path):
    """The JSON object in a file, a dict. Raises InputError where there is no such thing."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deep to be meant") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object but a {type(value).__name__}")
    return value


def field(raw, name, kind, default=None, least=None, most=None, where="config.json"):
    """raw[name], checked: of the type `kind` and within bounds. InputError where it is not.

    raw       a dict from a JSON file
    kind      int, float (an int will do), bool, str, dict or list
    default   what null and absence stand for; None: it must be there
    """
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise InputError(f"{where} lacks {name!r}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{where}: {name} is {value!r}, not of type {kind.__name__}")
    if kind in (int, float) and not (least is None or least <= value <= most):
        raise InputError(f"{where}: {name} is {value!r}, not between {least} and {most}")
    return value


def read_note(raw):
    """train.py's note in a parsed config.json, for who decodes: a dict, {} without one. Checked."""
    note, where = field(raw, "nanomtp", dict, {}), "config.json's nanomtp"
    if note:
        field(note, "k_max", int, 1, least=1, most=1000, where=where)
        field(note, "mask_token_id", int, 0, least=0, most=10 ** 8, where=where)
        for name in ("bidirectional", "loop"):
            field(note, name, bool, False, where=where)
        field(note, "data", str, "", where=where)
        if field(note, "prompt_format", str, "plain", where=where) not in ("plain", "chat"):
            raise InputError(f"{where}: prompt_format is {note['prompt_format']!r}")
    return note


def start_files(folder):
    """The files with a model's weights in a folder: one, or shards and their index; [] for none."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    return [*weight_files(folder), index] if index.exists() else []


def weight_files(folder):
    """The safetensors files of a folder, in order: one file, or the shards that the index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        raise InputError(f"{folder} holds no model.safetensors (pickled weights are not read: "
                         "convert them first)")
    names = sorted(set(map(str, field(read_json(index), "weight_map", dict, {}).values())))
    if any(Path(name).name != name for name in names):
        raise InputError(f"{index} names files outside {folder}: these are not read")
    shards = [folder / name for name in names]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing or not shards:
        raise InputError(f"{index} names {missing or 'no shards'}, absent from {folder}: "
                         "download the folder again")
    return shards


def read_weights(folder):
    """All tensors of a folder, {name: tensor}, in the dtype on disk. InputError if one is bad."""
    weights = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq"):        # old checkpoints carry it along
                        continue
                    weights[name] = tensors.get_tensor(name)
                    if not weights[name].isfinite().all():
                        raise InputError(f"{file}: {name} holds infinite numbers or NaN")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a readable safetensors file ({error}): "
                             "download it again") from None
    return weights


# --------------------------------------------------------------------------------------------------
# Writing

def write_bytes(path, data):
    """Write a file whole or not at all: under another name first, then renamed."""
    path = Path(path)
    if path.exists() and not path.is_file():            # a device, a folder: no file of ours
        raise InputError(f"cannot write {path}: it is no regular file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_bytes(path, text.encode("utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(folder):
    """Yields a temporary sibling of `folder`, renamed to `folder` only if the block ends well.

    A folder under its final name is therefore always whole: a crash, Ctrl-C or a full disk leaves
    at most a hidden `.NAME.*` folder, which nothing reads. InputError where the disk refuses.
    """
    folder = Path(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)              # mkdtemp makes it private; a checkpoint is not
        yield temporary
        # the name must not reach the disk before the bytes do
        for file in filter(Path.is_file, temporary.rglob("*")):
            file.chmod(0o644)               # safetensors writes private files
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
            # a checkpoint of that name is there already (a step saved again, a lost race): ours
            # takes its place
            old = temporary.with_name(temporary.name + ".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {folder}: {reason}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
