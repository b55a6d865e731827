"""
common/files.py: what is damaged is refused in one line, and what is written is whole or not there.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_VOCAB, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from common.cli import InputError
from common.files import new_folder, read_json, read_weights, write_json
from common.tokenizer import Tokenizer
from model import Transformer


def refused(call, *words):
    """`call()` must raise InputError with one line that holds all `words`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20
    for word in words:
        assert str(word) in message


def entries(folder):
    """The names of everything in a folder, hidden files included; [] where there is none."""
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.fixture
def copy(tiny, tmp_path):
    """A tiny checkpoint of one's own, to be damaged; whole, it loads."""
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    Transformer.from_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------
# Damaged checkpoints

@pytest.mark.parametrize("change, word", [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}, "yarn"),
    ({"num_hidden_layers": 3}, "model.layers.2."),              # asks for more than there is
    ({"num_hidden_layers": 1}, "model.layers.1."),              # ... and for less
    ({"tie_word_embeddings": False}, "lm_head.weight"),         # not tied in silence
    ({"intermediate_size": 100}, "(100, 64)"),
    ({"vocab_size": TINY_VOCAB - 1}, f"({TINY_VOCAB - 1}, 64)"),
    ({"hidden_size": None}, "hidden_size"),                     # None: the key is gone
    ({"vocab_size": None}, "vocab_size"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"intermediate_size": None}, "intermediate_size"),
])
def test_config_that_does_not_fit(copy, change, word):
    config = read_json(copy / "config.json") | change
    config = {key: value for key, value in config.items() if value is not None}
    write_json(copy / "config.json", config)
    refused(lambda: Transformer.from_pretrained(copy), word)


def test_tensors_that_do_not_fit(copy):
    file, name = copy / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    without = {key: tensor for key, tensor in weights.items() if key != name}
    for changed, words in [
            (without, [name, "1 tensors missing"]),
            (weights | {"model.layers.1.mlp.extra": torch.ones(1)}, ["mlp.extra", "1 unexpected"]),
            (weights | {name: weights[name].T.contiguous()}, [name, "(64, 96)", "(96, 64)"])]:
        save_file(changed, file)
        refused(lambda: Transformer.from_pretrained(copy), *words)


@pytest.mark.parametrize("damage", [
    lambda data: b"",
    lambda data: data[:200],                                    # inside the header
    lambda data: data[:-100],                                   # an interrupted download
    lambda data: b"\xff" * 1000,
    lambda data: b"version 1\noid sha256:00\nsize 12345\n",     # a Git LFS pointer in its place
])
def test_corrupted_safetensors(copy, damage):
    file = copy / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(lambda: Transformer.from_pretrained(copy), "model.safetensors", "not a readable")


def test_missing_shard(tmp_path):
    tiny_model(tmp_path, tiny_config(), max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(lambda: read_weights(tmp_path), shards[1].name, "index.json names")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(lambda: read_weights(tmp_path), "no shards")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(lambda: read_weights(tmp_path), "not valid JSON")


def test_pickles_are_not_read(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(lambda: Transformer.from_pretrained(copy), "no model.safetensors", "pickle")


@pytest.mark.parametrize("text, word", [
    (None, "cannot read"),                                      # None: there is no such file
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"\xff\xfe\x00", "not valid JSON"),
    (b"[]", "no JSON object"),
])
def test_json_that_cannot_be_used(copy, text, word):
    for name, load in [("config.json", Transformer.from_pretrained), ("config.json", Tokenizer),
                       ("tokenizer.json", Tokenizer)]:
        file = copy / name
        whole = file.read_bytes()
        file.write_bytes(text) if text is not None else file.unlink()
        refused(lambda: load(copy), file, word)
        file.write_bytes(whole)


# --------------------------------------------------------------------------------------------------
# Writing

FULL = OSError(28, "No space left on device")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    write_json(file, {"é": 1})
    assert read_json(file) == {"é": 1} and entries(tmp_path) == ["table.json"]
    before = file.read_bytes()
    write_bytes = Path.write_bytes

    def half(path, data):
        write_bytes(path, data[:len(data) // 2])
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", half)
    refused(lambda: write_json(file, {"é": 2}), file, "No space left")
    assert file.read_bytes() == before and entries(tmp_path) == ["table.json"]
    refused(lambda: write_json(tmp_path / "absent" / "a.json", {}), "cannot write to")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug"), FULL])
def test_an_unfinished_folder_leaves_nothing(tmp_path, error):
    """Ctrl-C, a bug or a full disk when half of the files are written."""
    def save():
        with new_folder(tmp_path / "deep" / "model") as folder:
            (folder / "config.json").write_text("{}")
            raise error

    if error is FULL:
        refused(save, "cannot write", "No space left")
    else:
        with pytest.raises(type(error)):
            save()
    assert entries(tmp_path / "deep") == []


def test_a_folder_in_the_way(tmp_path):
    """An empty folder is filled, a checkpoint gives way, and anything else is not touched."""
    def save(folder, content):
        with new_folder(folder) as temporary:
            (temporary / "config.json").write_text(content)

    (tmp_path / "empty").mkdir()
    for content in ("first", "second"):
        save(tmp_path / "empty", content)
        assert (tmp_path / "empty" / "config.json").read_text() == content
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o755     # though it was private
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("x")
    refused(lambda: save(tmp_path / "diary", "third"), "cannot write")
    refused(lambda: save(tmp_path / "diary" / "monday.txt" / "model", "fourth"), "cannot write")
    assert entries(tmp_path) == ["diary", "empty"] and entries(tmp_path / "diary") == ["monday.txt"]


def test_a_killed_writer_leaves_a_hidden_folder(tmp_path):
    """kill -9 runs no clean-up; what stays behind is not taken for a checkpoint."""
    script = ("import os, sys, pathlib\n"
              "from common.files import new_folder\n"
              "with new_folder(pathlib.Path(sys.argv[1]) / 'model') as folder:\n"
              "    (folder / 'config.json').write_text('{}')\n"
              "    os._exit(9)\n")
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == 9
    left, = entries(tmp_path)
    assert left.startswith(".model.")
    with new_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert entries(tmp_path) == [left, "model"] and entries(tmp_path / "model") == ["config.json"]
