"""
The transformer: Llama (3.x, SmolLM2), Qwen2/2.5 and Qwen3, by hand, in one file.

    from model import Transformer
    model = Transformer.from_pretrained("path/to/a/hugging/face/folder")
    logits = model(ids, positions, mask)                        # (B, T, V)

The model knows nothing about multi-token prediction. It takes *any* positions and *any* boolean
attention mask; all of the method lives in who calls it: mtp.py lays out training, sample.py and
speculate.py decoding.

Modules carry the names of the checkpoint (`model.layers.0.self_attn.q_proj`), so that loading is a
strict `load_state_dict` and a saved model opens in transformers unchanged.

Shapes: B batch, T fed tokens, S keys (T without a cache), C hidden size, H query heads, G key/value
heads, D head size, I inner size of the MLP, V vocabulary.
"""
import copy
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from common.cli import InputError
from common.files import field, read_json, read_weights, write_json

# --------------------------------------------------------------------------------------------------
# Configuration

FAMILIES = ("llama", "qwen2", "qwen3")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MOST = 10 ** 8                      # no size is meant to be larger


@dataclass
class Config:
    """The part of config.json that decides what is computed."""
    vocab_size: int                 # V
    hidden_size: int                # C
    intermediate_size: int          # I
    num_hidden_layers: int
    num_attention_heads: int        # H
    num_key_value_heads: int        # G: H of them, or fewer, each shared by H / G query heads
    head_dim: int                   # D
    rms_norm_eps: float
    max_position_embeddings: int    # context length, tokens
    rope: dict                      # rope_type, rope_theta and, for llama3, LLAMA3_ROPE
    tie_word_embeddings: bool       # the output matrix is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool                   # Qwen3 normalises each head of q and k
    raw: dict                       # the whole file, to be written back

    @classmethod
    def from_dict(cls, raw):
        """A parsed config.json of transformers 4 or 5. InputError for what we cannot compute."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise InputError(f"unsupported architecture {family!r} (supported: "
                             f"{', '.join(FAMILIES)})")
        if raw.get("hidden_act", "silu") != "silu" or raw.get("use_sliding_window", False):
            raise InputError("config.json asks for sliding windows or an activation other than "
                             "silu: unsupported")

        # transformers 5 keeps all of it in `rope_parameters`; 4 has a top-level theta and an
        # optional `rope_scaling`
        rope = field(raw, "rope_parameters", dict, {}) or field(raw, "rope_scaling", dict, {})
        rope = {"rope_type": rope.get("type"), "rope_theta": raw.get("rope_theta")} | rope
        rope["rope_type"] = field(rope, "rope_type", str, "default")
        rope["rope_theta"] = field(rope, "rope_theta", float, 10000.0, least=1, most=1e12)
        if rope["rope_type"] not in ("default", "llama3"):
            raise InputError(f"unsupported rope type {rope['rope_type']!r} (supported: default, "
                             "llama3)")
        if rope["rope_type"] == "llama3":
            for name in LLAMA3_ROPE:
                rope[name] = field(rope, name, float, least=1e-3, most=MOST)
            if rope["high_freq_factor"] <= rope["low_freq_factor"]:
                raise InputError("config.json: high_freq_factor must be above low_freq_factor")

        def size(name, default=None):
            return field(raw, name, int, default, least=1, most=MOST)

        def switch(name):
            return field(raw, name, bool, False)

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        config = cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", 128 if family == "qwen3" else max(1, hidden // heads)),
            rms_norm_eps=field(raw, "rms_norm_eps", float, 1e-6, least=0, most=1),
            max_position_embeddings=size("max_position_embeddings", 2048),
            rope=rope,
            tie_word_embeddings=switch("tie_word_embeddings"),
            qkv_bias=switch("attention_bias") or family == "qwen2",     # which does not say so
            o_bias=switch("attention_bias") and family != "qwen2",
            mlp_bias=family == "llama" and switch("mlp_bias"),
            qk_norm=family == "qwen3",
            raw=raw)
        if heads % config.num_key_value_heads or config.head_dim % 2:
            raise InputError("config.json: num_key_value_heads must divide num_attention_heads, "
                             "and head_dim must be even")
        return config


# --------------------------------------------------------------------------------------------------
# Rotary position embedding, the half-split form: dimension d turns together with dimension d + D/2

def rope_frequencies(config):
    """Angle per position of each pair of dimensions: (D/2,) fp32, radians.

    "llama3" scaling (Llama 3.1 and later) divides the slow frequencies by `factor`, keeps the fast
    ones, and blends in between, so that a model trained on 8k tokens reads far longer texts.
    """
    rope, D = config.rope, config.head_dim
    exponents = torch.arange(0, D, 2, device="cpu").float() / D             # (D/2,) 0 to below 1
    frequency = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "llama3":
        factor, length = rope["factor"], rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = length * frequency / (2 * math.pi)          # full turns within the original context
        blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, divide; 1: fast, keep
        frequency = (1 - blend) * frequency / factor + blend * frequency
    return frequency


def apply_rope(x, cos, sin):
    """Rotate x, (B, heads, T, D), by the angles in cos and sin, (B, 1, T, D) each.

    A pair (a, b), D/2 apart, becomes (a cos - b sin, b cos + a sin). Rolling by D/2 swaps a and b;
    the minus is in `sin`, whose first half is negative.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# --------------------------------------------------------------------------------------------------
# Key/value cache

class KVCache:
    """Preallocated keys and values of every layer, indexed by place.

        place of row b    0 .. length[b] - 1    length[b] .. length[b] + T - 1    behind these
        holds             what is committed     the T tokens of this pass         leftovers, zeros

    keys, values    lists, by layer, of (B, capacity, G, D)
    length          (B,) long: committed tokens; rows may differ

    `advance` decides how many of a pass's tokens were kept. To forget the others nothing has to be
    erased: the next pass writes over them, from the committed length on, and the caller's mask
    shows a query no place behind those that its own pass has written.
    """

    def __init__(self, model, batch_size, capacity, layers=None):
        """Room for `capacity` tokens a row, on the model's device and in its dtype.

        layers   how many, where it is not the model's own number of them
        """
        c, like = model.config, model.model.embed_tokens.weight
        layers = c.num_hidden_layers if layers is None else layers
        shape = (batch_size, capacity, c.num_key_value_heads, c.head_dim)   # (B, capacity, G, D)
        # not like.new_zeros: FSDP has weights that are spread over ranks, the cache is not
        self.keys, self.values = (
            [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
            for _ in range(2))
        self.length = torch.zeros(batch_size, dtype=torch.long, device=like.device)

    def next_places(self, count):
        """The places that the next `count` tokens of each row will be written to: (B, count)."""
        return self.length[:, None] + torch.arange(count, device=self.length.device)

    def write(self, layer, places, keys, values, span):
        """Store what a pass has computed, and return it behind what was there before.

        places          (B, T) long
        keys, values    (B, T, G, D)
        returns         keys and values of the first `span` places, two (B, span, G, D)
        """
        row = torch.arange(len(places), device=places.device)[:, None]                  # (B, 1)
        self.keys[layer][row, places] = keys.to(self.keys[layer].dtype)
        self.values[layer][row, places] = values.to(self.values[layer].dtype)
        return self.keys[layer][:, :span], self.values[layer][:, :span]

    def advance(self, count):
        """Commit the first `count` (B,) tokens of the last pass."""
        self.length = self.length + count

    def keep_rows(self, rows):
        """Drop all batch rows but `rows`, a list."""
        if len(rows) == len(self.length):
            return
        rows = torch.tensor(rows, dtype=torch.long, device=self.length.device)
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.length = self.length[rows]


# --------------------------------------------------------------------------------------------------
# Layers

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # normalise in fp32, cast back, *then* scale: transformers' order, which decides the last
        # bit in bf16
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: each of the G key/value heads serves H / G query heads."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache, layer, places):
        """x (B, T, C) -> (B, T, C); the others are as `Transformer.forward` makes them.

        cos, sin    (B, 1, T, D): the angles of the fed tokens' positions
        mask        (T, S) or (B, 1, T, S), added to the scores: 0 where a query may look, else -inf
        cache       a KVCache or None; this is its layer number `layer`
        places      (B, T) long: where the fed tokens go in the cache
        """
        B, T, _ = x.shape

        # --- queries, keys and values, split into heads
        if hasattr(self, "qkv_proj"):                               # see fuse
            q, k, v = self.qkv_proj(x)                              # (B, T, H*D), 2 * (B, T, G*D)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.view(B, T, -1, self.head_dim)                         # (B, T, H, D)
        k = k.view(B, T, -1, self.head_dim)                         # (B, T, G, D)
        v = v.view(B, T, -1, self.head_dim)                         # (B, T, G, D)

        # --- positions: queries and keys are rotated, values are not
        if hasattr(self, "q_norm"):                                 # Qwen3: per head, before it
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q.transpose(1, 2), cos, sin)                 # (B, H, T, D)
        k = apply_rope(k.transpose(1, 2), cos, sin)                 # (B, G, T, D)

        # --- with a cache, the keys and values of earlier passes come in front: S of them
        if cache is None:
            v = v.transpose(1, 2)                                   # (B, G, S, D), S = T
        else:
            k, v = cache.write(layer, places, k.transpose(1, 2), v, span=mask.shape[-1])
            k, v = k.transpose(1, 2), v.transpose(1, 2)             # (B, G, S, D)

        # --- softmax(q k^T / sqrt(D) + mask) v
        if q.is_cuda:
            # no fused CUDA kernel takes a mask and grouped heads at once (torch 2.13): repeat them
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        # Always an explicit mask: is_causal=True would be aligned to the top left, wrong behind a
        # non-empty cache
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        y = y.transpose(1, 2).reshape(B, T, -1)                     # (B, H, T, D) -> (B, T, H*D)
        return self.o_proj(y)                                       # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: a projection up, times the SiLU of another one, the gate; and down again."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        if hasattr(self, "gate_up_proj"):                           # see fuse
            gate, up = self.gate_up_proj(x)                         # (B, T, I) each
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)                    # (B, T, C)


PACK_FROM = 2 ** 18         # elements; smaller matrices lie in the processor's cache as they are


class Fused(nn.Module):
    """Linear layers of one input as one matrix product, for decoding; see `fuse`."""

    def __init__(self, *layers):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        weight = input_major(torch.cat([layer.weight.detach() for layer in layers]))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if layers[0].bias is not None:
            bias = torch.cat([layer.bias.detach() for layer in layers])
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.packed = pack(weight)

    def forward(self, x):
        """(B, T, C) -> (B, T, out) of the one layer, or a tuple of them."""
        y = fast_linear(x, self.weight, self.packed, self.bias)
        return y if len(self.sizes) == 1 else y.split(self.sizes, dim=-1)


def input_major(matrix):
    """The same matrix, stored column by column."""
    return matrix.t().contiguous().t()


def pack(matrix):
    """A matrix in the memory order of oneDNN, PyTorch's CPU library; None where that is no help.

    torch.compile's ops for frozen weights: not documented, hence the pinned version of torch.
    """
    if matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        return None
    if matrix.numel() < PACK_FROM or not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), 4)


def fast_linear(x, matrix, packed, bias=None):
    """F.linear(x, matrix, bias), for few rows of x by the packed matrix, if there is one.

    Left to itself PyTorch packs the matrix anew for every product of several rows. Fewer than four
    are filled up: products of four are the fastest there are.
    """
    rows = x.numel() // x.shape[-1]
    if packed is None or rows > 64:
        return F.linear(x, matrix, bias)
    full = F.pad(x.reshape(rows, -1), (0, 0, 0, max(0, 4 - rows)))          # (4 or rows, C)
    y = torch.ops.mkldnn._linear_pointwise(full, packed, bias, "none", [], "")
    return y[:rows].view(*x.shape[:-1], -1)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *where):
        """x (B, T, C) -> (B, T, C); `where` is all that Attention takes beside it."""
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


def run_blocks(blocks, x, positions, mask, frequencies, cache=None, first_layer=0):
    """Hidden states through some blocks: (B, T, C) -> (B, T, C).

    positions, mask, cache      as `Transformer.forward` takes them
    frequencies                 (D/2,) fp32, of `rope_frequencies`, on x's device
    first_layer                 number of the first block's layer in the cache
    """
    # --- positions: the angle of each pair of dimensions, fp32 even in a bf16 model
    angles = positions[..., None].float() * frequencies                     # (B, T, D/2)
    cos = angles.cos().repeat(1, 1, 2)                                      # (B, T, D)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)                  # (B, T, D)
    cos = cos[:, None].to(x.dtype)                          # (B, 1, T, D): the same for every head
    sin = sin[:, None].to(x.dtype)

    # --- who sees whom: 0 or -inf on top of the scores, made once and not in every layer
    if mask.dim() == 3:
        mask = mask[:, None]                                # (B, 1, T, S): the same for every head
    mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)

    # --- the layers
    places = None if cache is None else cache.next_places(x.shape[1])       # (B, T)
    for layer, block in enumerate(blocks, first_layer):
        x = block(x, cos, sin, mask, cache, layer, places)                  # (B, T, C)
    return x


def fuse(blocks):
    """Prepare blocks for decoding, in place: q, k, v and gate, up as one matrix product each, and
    every matrix stored as products of few rows are fast with.

    A pass over a few tokens waits for memory and for one kernel after another: fewer, larger
    products are faster. On a CPU large matrices are also kept packed (`pack`), a second copy of
    the weights, for passes of up to 64 rows; the others are stored input-major (x @ W, not
    x @ W.T), which is faster for a row or two. The numbers stay the same up to rounding. What is
    fused can no longer be trained or saved: modules have lost the checkpoint's names.
    """
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        join = getattr(attention.q_proj, "joined", Fused)           # adapters.py has its own
        attention.qkv_proj = join(attention.q_proj, attention.k_proj, attention.v_proj)
        attention.o_proj = join(attention.o_proj)
        mlp.gate_up_proj = join(mlp.gate_proj, mlp.up_proj)
        mlp.down_proj = join(mlp.down_proj)
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj


class Decoder(nn.Module):
    """All but the output matrix. A module of its own only because the checkpoint's names start with
    `model.`; `Transformer.forward` runs it."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# --------------------------------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # A plain attribute and not a buffer: `.to(bfloat16)` would round it, and long positions
        # with it
        self.frequencies = rope_frequencies(config)                         # (D/2,) fp32
        self.packed_output = None                                           # see `fuse`

    @property
    def output_matrix(self):
        """(V, C): the embedding itself where the two are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def forward(self, ids, positions, mask, cache=None, at=None, head=True):
        """Next-token logits.

        ids         (B, T) long: the tokens that are fed
        positions   (B, T) long: where each stands in the text; any integers, repeats allowed
        mask        (T, S) or (B, T, S) bool: True where a query may attend to a key; every query
                    needs at least one key. Keys are the fed tokens (S = T), or the first S places
                    of the cache, this pass's tokens included
        cache       a KVCache: tokens are written behind each row's committed length, which does
                    *not* advance
        at          index into (B, T), such as a pair of LongTensors: logits only there.
                    Vocabularies are large; most positions' logits are never looked at
        head        False: the final hidden states instead, which `logits` turns into logits: for
                    who wants them in portions, or both
        returns     (B, T, V), or (*at, V) with `at`; C in place of V without `head`
        """
        # --- tokens in, and through the layers
        x = self.model.embed_tokens(ids)                                    # (B, T, C)
        self.frequencies = self.frequencies.to(ids.device)
        x = run_blocks(self.model.layers, x, positions, mask, self.frequencies, cache)

        # --- logits out, where they are wanted
        x = self.model.norm(x if at is None else x[at])                     # (B, T, C) or (*at, C)
        return self.logits(x) if head else x                                # V in place of C

    def fuse(self):
        """See the function `fuse`. In place; returns the model."""
        fuse(self.model.layers)
        self.requires_grad_(False)
        matrix = self.output_matrix
        matrix.data = input_major(matrix.data)
        self.packed_output = pack(matrix.data)
        return self

    def logits(self, hidden):
        """Hidden states (..., C) -> logits (..., V)."""
        return fast_linear(hidden, self.output_matrix, self.packed_output)

    @classmethod
    def from_scratch(cls, folder, seed=0, device="cpu"):
        """Random fp32 weights for the config.json of `folder`, as in GPT-2.

        Matrices are normal with standard deviation 0.02, smaller where a block adds to the residual
        stream, which sums up 2 * layers of them; norms are 1, biases 0.
        """
        generator = torch.Generator().manual_seed(seed)
        model = cls(Config.from_dict(read_json(Path(folder) / "config.json")))
        additions = 2 * model.config.num_hidden_layers
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                ends_block = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(additions) if ends_block else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return model.to(device)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a Hugging Face folder.

        Raises InputError where a tensor is missing, left over or of the wrong shape.
        """
        config = Config.from_dict(read_json(Path(folder) / "config.json"))
        weights = read_weights(folder)

        # --- layers behind the last one are no part of the model: heads.py, DeepSeek-V3 and others
        # keep multi-token heads there
        layers = config.num_hidden_layers
        for layer in range(layers, layers + field(config.raw, "num_mtp_layers", int, 0, 0, 1000)):
            beyond = f"model.layers.{layer}."
            weights = {name: x for name, x in weights.items() if not name.startswith(beyond)}

        # --- tied, says config.json, and yet there is an output matrix: a copy, or a second one?
        if config.tie_word_embeddings and "lm_head.weight" in weights:
            embedding = weights.get("model.embed_tokens.weight", torch.empty(0))
            if torch.equal(weights["lm_head.weight"], embedding):
                del weights["lm_head.weight"]
            else:                                                   # transformers 5 does the same
                print("note: config.json ties the embeddings but the checkpoint holds two "
                      "different ones: not tied")
                config.tie_word_embeddings = False

        # --- the same names and shapes on both sides?
        with torch.device("meta"):                                  # no memory, no initialisation
            model = cls(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        missing, surplus = expected.keys() - weights.keys(), weights.keys() - expected.keys()
        if missing or surplus:
            raise InputError(f"{folder}: config.json and weights disagree: {len(missing)} tensors "
                             f"missing, {len(surplus)} unexpected, e.g. {min(missing or surplus)}")
        for name, shape in expected.items():
            if weights[name].shape != shape:
                raise InputError(f"{name} has shape {tuple(weights[name].shape)}, config.json says "
                                 f"{tuple(shape)}")

        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, strict=True, assign=True)
        return model.to(device)


# --------------------------------------------------------------------------------------------------
# One token more, and back to disk

def add_mask_token(model, mask_id, seed=0):
    """Give the model an input (and, if untied, output) row for one new token, in place.

    mask_id   the first id that the tokenizer does not use: a free row of the matrix if there is one
              (Qwen pads its matrices), else the matrix grows by one row

    The row is drawn from a normal with the mean and standard deviation, per dimension, of the rows
    in use (the paper's rule). Raises InputError where `mask_id` is beyond the first new row.
    """
    vocab_size = model.config.vocab_size
    if not 0 < mask_id <= vocab_size:
        raise InputError(f"mask token id {mask_id} does not fit a vocabulary of {vocab_size}")
    generator = torch.Generator().manual_seed(seed)
    tables = [model.model.embed_tokens]
    if not model.config.tie_word_embeddings:
        tables.append(model.lm_head)
    for table in tables:
        old = table.weight.data                                             # (V, C)
        used = old[:mask_id].float()
        noise = torch.randn(old.shape[1], generator=generator).to(old.device)
        row = (used.mean(0) + used.std(0) * noise).to(old.dtype)            # (C,)
        new = torch.cat((old[:mask_id], row[None], old[mask_id + 1:]))      # (V, C) or (V + 1, C)
        table.weight = nn.Parameter(new)
    model.config.vocab_size = max(vocab_size, mask_id + 1)


def save_pretrained(model, folder, weights=None):
    """Write config.json and model.safetensors into `folder`, as transformers expects them.

    weights   {name: tensor}, where they are not to be taken from the model itself, which may be
              spread over several GPUs

    config.json is the one that was read, `model.config.raw`, with what has changed since; train.py
    keeps its own notes there, under "nanomtp". The tokenizer's files are `Tokenizer.save`'s.
    """
    if any(isinstance(module, Fused) for module in model.modules()):
        raise InputError("a fused model has lost the checkpoint's names: save it before fuse()")
    weights = model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}

    raw = copy.deepcopy(model.config.raw)
    raw["vocab_size"] = model.config.vocab_size
    raw["tie_word_embeddings"] = model.config.tie_word_embeddings
    dtype = str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype       # transformers 5 and 4

    write_json(Path(folder) / "config.json", raw)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    if "mask_token_id" in raw.get("nanomtp", {}):
        add_custom_generate(folder)


def add_custom_generate(folder):
    """Put common/custom_generate/generate.py into a folder: with it transformers decodes the model
    as sample.py does."""
    target = Path(folder) / "custom_generate"
    target.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).parent / "common" / "custom_generate" / "generate.py", target)
