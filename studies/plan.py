"""
How much memory does training take? An estimate of train.py's peak, component by component; no
weights are loaded for it.

    python -m studies.plan --preset smollm2                     # flags and defaults are train.py's
    python -m studies.plan --preset paper --model Qwen/Qwen3-0.6B --dtype bf16 --memory 24 80
    python -m studies.plan --preset paper --dtype bf16 --gpus 4 --fsdp --memory 80
    python -m studies.plan --preset paper --dtype bf16 --adapters 64 --memory 12 24
    python -m studies.plan --preset paper --dtype bf16 --heads 4 --memory 12 24
    python -m studies.plan --measure --out plan.json            # beside it: the peak of real steps

Give it the flags that train.py will get (python train.py --help). What counts is --preset --model
--batch-size --micro-batch-size --seq-len --targets, --dtype (auto: what this machine would choose);
with mask tokens --k --stride --adapters --bidirectional --prefix-loss --slot1-weight; with heads
--heads --loop --extend --draft-vocab --kl-top (--keep-gb is the CPU's memory, also on a GPU).

Planned is the longest pass: k = --k, texts of --seq-len tokens, of which the first --prompt-tokens
are the prompt and the others an answer with an anchor at every --stride-th token, or with drafts at
each. Of several GPUs the table is about one. It counts tensors, at the moment when there are most.
On top come the CUDA context and fragmentation or, on a CPU, the holes of glibc's heap (--measure
shows by how much the process grew); loading, evaluation and --compile are left out.

Held against measurements on a CPU. What it says of CUDA, DDP and FSDP follows torch's source and is
not measured.

Shapes: B sequences of a pass, R regions of a sequence, L fed tokens of a sequence, M slots of a
pass; T text tokens and N starts of drafting, S keys; V vocabulary, C hidden size, I inner size of
the MLP, H query heads, G key/value heads, D head size; P parameters. 1 GB is 10^9 bytes.
"""
import argparse
import concurrent.futures
import contextlib
import itertools
import math
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mtp
import train
from adapters import Adapted, add_adapters
from common import cli
from common.cli import SWITCH, ArgumentParser, InputError
from common.files import read_json, write_json
from common.hub import resolve
from common.machine import (
    DTYPES, dtype_name, keep_freed_memory, machine, peak_memory, pick_device, pick_dtype)
from heads import Backbone, Heads, head_loss, make_head_batch
from model import Config, Transformer
from studies import output_file

SPARE = 0.1         # share of --memory that stays free

# No download needed: what matters here of the config.json that each publisher has on the hub
KEYS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
        "max_position_embeddings")
KNOWN = {
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True, 8192),
    "Qwen/Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True, 40960),
    "Qwen/Qwen3-4B-Instruct-2507":
        ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True, 262144),
    "meta-llama/Llama-3.1-8B-Instruct":
        ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072),
}


def load_config(name):
    """The Config of `--model`: of a hub id only config.json is fetched. InputError without one."""
    if name in KNOWN:
        return Config.from_dict(dict(zip(KEYS, KNOWN[name])))
    if "/" not in name or Path(name).expanduser().exists():
        return Config.from_dict(read_json(resolve(name) / "config.json"))
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json")
    except Exception as error:          # whatever the hub, or its absence, comes up with
        raise InputError(f"no folder and no hub model {name!r} ({type(error).__name__}); known "
                         f"without a download: tiny, {', '.join(KNOWN)}") from None
    return Config.from_dict(read_json(path))


class Counts(NamedTuple):
    """Numbers of parameters."""
    model: int              # of the start model
    matrices: int           # in the matrices of its blocks
    block: int              # in one block
    added: int              # in heads, or in adapters and the mask token's row
    trained: int            # of these, what is trained: with --extend half of them
    copied: int             # of these, what is in matrices, which autocast copies


def count_parameters(config, args):
    """Counts for train.py's flags, from models without memory."""
    with torch.device("meta"):
        model = Transformer(config)
        heads = Heads(config, args.heads or 0, args.loop).heads     # none without --heads
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]

    # --- what is trained beside a frozen model
    trained = list(heads[args.heads // 2 if args.extend else 0:].parameters())
    trained, copied = total_size(trained), total_size(p for p in trained if p.dim() == 2)
    added = total_size(heads.parameters())
    if args.adapters:                                       # A (r, in) and B (out, r) of each
        copied = args.adapters * sum(sum(p.shape) for p in matrices)
        added = trained = copied + config.hidden_size       # the mask token's row

    return Counts(total_size(model.parameters()), total_size(matrices),
                  total_size(model.model.layers[0].parameters()), added, trained, copied)


def total_size(parameters):
    return sum(p.numel() for p in parameters)


# --------------------------------------------------------------------------------------------------
# What autograd keeps for the backward pass, in bytes. A product y = W x keeps x where W is trained;
# where W is frozen it keeps nothing, since W is there anyway.
#
# a is the bytes of a number inside the layers, 2 (bf16) or 4 (fp32), s those of one between them

def kept_by_norm(size, a, s=0, readers=0):
    """By a norm over `size` numbers, for each token: its input in fp32 and 1 / rms; the normalised
    input, for the gradient of its weight (s = 0: which is frozen); the result, once for each of its
    `readers` that keeps a copy of its own."""
    return 4 * size + 4 + s * size + readers * a * size


def kept_by_attention(c, S, a, kind):
    """In a layer, with S keys: (for each query, for each key)."""
    H, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    if kind == "math":
        # q and probabilities; k and v: all in fp32, all for H heads
        return 4 * H * D + 4 * H * S, 8 * H * D
    # q, output and log-sum-exp; k and v
    return 2 * a * H * D + 4 * H, 2 * a * (H if kind == "repeated" else G) * D


def kept_by_block(c, S, a, s, autocast, kind):
    """Of each token in a layer all of whose weights are trained: (norms, attention, MLP).

    autocast    every matrix product makes a bf16 copy of its own of its fp32 input. Without, one
                tensor serves all who read it
    """
    C, H, G, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    norms = kept_by_norm(C, a, s, readers=3 if autocast else 1)             # q, k and v read it
    norms += kept_by_norm(C, a, s, readers=2 if autocast else 1)            # gate and up
    if c.qk_norm:
        norms += (H + G) * kept_by_norm(D, a, s=a)
    attention = sum(kept_by_attention(c, S, a, kind))
    if kind == "math":
        attention += a * H * D                              # the output, as o_proj reads it
    elif s != a:
        attention += a * S                                  # the mask, cast anew in every layer
    return norms, attention, 4 * a * c.intermediate_size    # gate, silu(gate), up, their product


def kept_by_frozen_block(c, S, a, rank, kind):
    """Of each mask token in a frozen layer with adapters: (norms, attention, MLP, adapters). And of
    each of the S keys, the text's included."""
    C, H, G, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    inner = c.intermediate_size
    norms = 2 * kept_by_norm(C, a)
    if c.qk_norm:
        norms += (H + G) * kept_by_norm(D, a)
    query, key = kept_by_attention(c, S, a, kind)
    # Each A picks the mask tokens out of its input, and keeps that copy: of q, k, v; o; gate, up;
    # down. Each of the seven B keeps A x
    adapters = a * (3 * C + H * D + 2 * C + inner) + 7 * a * rank
    return (norms, query, 3 * a * inner, adapters), key     # MLP: gate, silu(gate), up


def kept_around_block(C, a):
    """Of each token, by what a Head has around its block."""
    embedded = a * C                                        # enorm's input has no gradient
    states = kept_by_norm(C, a, s=4)                        # fp32: what the norm of a Head returns
    return embedded + states + a * 2 * C + kept_by_norm(C, a, s=a)      # both side by side; norm


# --------------------------------------------------------------------------------------------------
# What passes need for a moment, in bytes

def working(c, S, a, kind):
    """Of each token in a block that keeps nothing: inside the MLP or, without a fused kernel, at
    its scores with S keys."""
    scores = 12 * c.num_attention_heads * (S + c.head_dim) if kind == "math" else 0
    return max(a * (4 * c.intermediate_size + 3 * c.hidden_size), scores)


def going_backward(c, a):
    """Of each token in a block that goes backward: gradients of silu(gate) and of up."""
    return 2 * a * c.intermediate_size


def where_and_mask(c, S, a):
    """Of each token, once for all layers: cos and sin; its mask over S keys, as numbers."""
    return a * (2 * c.head_dim + S)


def logits_of(slots, V, a):
    """In `mtp.most_likely_of`: CHUNK slots have logits at a time, but a portion's live until the
    next one's are complete (m and m2 slots), logsumexp works on a copy, bf16 becomes fp32."""
    m, m2 = min(mtp.CHUNK, slots), max(0, min(mtp.CHUNK, slots - mtp.CHUNK))
    return V * max(8 * m, 4 * m + (4 if a == 4 else 6) * m2)


# --------------------------------------------------------------------------------------------------
# The estimate

class Shapes(NamedTuple):
    """Of the longest pass on one GPU."""
    B: int                  # sequences
    passes: int             # of a step
    R: int                  # regions of a sequence
    L: int                  # fed tokens of a sequence
    M: int                  # slots
    prefix: int             # text tokens of the prefix loss


def shapes(args, micro):
    rows = -(-args.batch_size // args.gpus)                 # sequences that a GPU sees in a step
    B = min(micro, rows)
    R = len(mtp.choose_anchors([args.prompt_tokens], [args.seq_len], 0, args.stride)[0])
    prefix = B * (args.seq_len - args.prompt_tokens) if args.prefix_loss else 0
    return Shapes(B, -(-rows // B), R, args.seq_len + R * (args.k - 1), B * R * args.k, prefix)


def total(rows):
    return sum(size for size, *_ in rows)


def estimate(args, c, counts, micro):
    """The peak as a list of rows (bytes, what, arithmetic): the sum is the estimate.

    c        the Config
    counts   what `count_parameters` says of it
    micro    sequences of a pass

    Each method has a function of its own. It says what is there all the time, and what comes on top
    at each of the moments that can be the worst: a list of rows, and a list of such lists.
    """
    method = of_all_weights
    if args.heads or args.adapters:
        method = of_heads if args.heads else of_adapters
    held, moments = method(args, c, counts, micro)
    return held + max(moments, key=total)


def of_batches(args, micro):
    """The row of a step's batches, made before its first pass: id, position and masks of every
    token; row, place and truth of every slot."""
    B, passes, _, L, M, prefix = shapes(args, micro)
    tokens, slots, own = B * L, M + prefix, 16 + (1 + args.bidirectional) * L
    return (passes * (tokens * own + 24 * slots), "a step's batches",
            f"{passes} passes * ({tokens:,} tokens * {own:,} B + {slots:,} slots * 24 B)")


def of_kept(layers, tokens, kind, sizes):
    """Rows of what so many tokens keep in so many layers: {what: bytes of a token in a layer}."""
    return [(tokens * layers * size, f"kept to go backward: {what}",
             f"{tokens:,} {kind} * {layers} layers * {size:,} B") for what, size in sizes.items()]


def of_all_weights(args, c, counts, micro):
    """Training of all weights: student, and teacher."""
    P, matrices, block = counts[:3]
    B, passes, _, L, M, prefix = shapes(args, micro)
    V, C, layers, tokens = c.vocab_size, c.hidden_size, c.num_hidden_layers, B * L
    a = DTYPES[args.dtype].itemsize
    # Autocast leaves what is between the layers in fp32; FSDP casts the weights instead
    s, share, over = (a, args.gpus, f" / {args.gpus} GPUs") if args.fsdp else (4, 1, "")
    autocast, teachers = s != a, 0 if args.targets == "ground-truth" else 1

    # --- What is there all the time
    held = [
        (4 * P / share, "student's weights, fp32", f"4 B * {P:,}{over}"),
        (8 * P / share, "AdamW's two moments, fp32", f"8 B * {P:,}{over}"),
        (a * P * teachers / share, f"teacher's weights, {args.dtype}",
         f"{a} B * {P * teachers:,}{over}"),
        of_batches(args, micro),
    ]
    if args.fsdp:
        # whole on every GPU: embedding and head; one block that works, one that arrives, one's
        # gradients
        roots = V * C * (1 if c.tie_word_embeddings else 2) * (1 + teachers)
        blocks = 3 * a + 4
        held.append((a * roots + blocks * block, "FSDP: what is gathered for now",
                     f"{a} B * {roots:,} + {blocks} B * {block:,}"))

    # --- The last pass of a step, before it goes backward: gradients of earlier passes are there
    forward = []
    if passes > 1:
        forward.append((4 * P / share, "gradients of the passes before, fp32",
                        f"4 B * {P:,}{over}"))
    norms, attention, mlp = kept_by_block(c, L, a, s, autocast, args.attention)
    forward += of_kept(layers, tokens, "tokens", {
        "norms": norms, f"attention, {args.attention}": attention, "MLP": mlp})
    if autocast:
        forward.append((a * matrices, "autocast: bf16 copies of the matrices",
                        f"{a} B * {matrices:,}"))
    slots, each = M + prefix, where_and_mask(c, L, s)
    forward += [
        (16 * C * slots, "hidden states at the slots", f"{slots:,} slots * 4 * 4 B * {C:,}"),
        (tokens * each, "rotations and masks", f"{tokens:,} tokens * {each:,} B"),
    ]

    # Then come three moments, the worst of which counts. Logits; autocast's copy of the head stays
    # until the pass ends
    m, logits, copy = min(mtp.CHUNK, M), logits_of(M, V, a), 2 * V * C if autocast else 0
    # The head: hard_loss has its gradient ready in the forward pass; going backward, autograd adds
    # as many zeros for an output of it that nobody uses
    again = args.slot1_weight != 1                          # slot 1 has a loss of its own, too
    head, alone = 4 * (2 + again + (prefix > 0)), False
    if args.targets == "soft":
        # p_T, log p_S and what they come from, anew in the backward pass. Each portion has a
        # gradient for the head, in fp32 a transposed view, which autograd does not add in place
        alone = M <= mtp.CHUNK and not again and not prefix
        head = a if alone else 8 if prefix else 3 * a
        logits = 12 * V * m + (0 if alone else a * V * C)
    # A block: the teacher's, or else the student's last one going backward
    work = working(c, L, a, args.attention) if teachers else going_backward(c, a)
    forward.append(max(
        (logits + copy, "worst moment: logits",
         f"{logits / V / m:.1f} B * {m:,} slots * {V:,} + {copy:,} B"),
        (head * V * C, "worst moment: the head's gradient", f"{head} B * {V:,} * {C:,}"),
        (tokens * work + copy, "worst moment: a block",
         f"{tokens:,} tokens * {work:,} B + {copy:,} B")))

    # --- Or else its end. A tied embedding is input and head at once: two gradients are added up,
    # beside that of the passes before
    more = 0
    if c.tie_word_embeddings:
        more = V * C * (1 + (passes > 1) + (alone and not autocast))
    backward = [(4 * (P + more) / share, "gradients, fp32", f"4 B * ({P:,} + {more:,}){over}")]
    return held, [forward, backward]


def of_adapters(args, c, counts, micro):
    """Training of adapters: one frozen model is student and teacher, and reads a text but once."""
    P, A, T = counts.model, counts.added, args.seq_len
    B, passes, _, L, M, _ = shapes(args, micro)
    V, C, layers = c.vocab_size, c.hidden_size, c.num_hidden_layers
    text, masks = B * T, B * (L - T)                        # tokens of a pass
    a = DTYPES[args.dtype].itemsize

    # --- What is there all the time
    own = a * (layers * 2 * c.num_key_value_heads * c.head_dim + C)
    held = [
        (a * P, f"frozen weights, {args.dtype}", f"{a} B * {P:,}"),
        (4 * A, "adapters, fp32", f"4 B * {A:,}"),
        (8 * A, "AdamW's two moments, fp32", f"8 B * {A:,}"),
        of_batches(args, micro),
        (text * own, "the text's keys, values, last states", f"{text:,} text tokens * {own:,} B"),
    ]
    gradients = (4 * A, "gradients, fp32", f"4 B * {A:,}")
    before = [gradients] if passes > 1 else []              # of the passes before

    # --- A text is read, without gradient
    each = working(c, T, a, args.attention) + where_and_mask(c, T, a) + T       # mask as bool
    reading = [(text * each, "worst moment: a block reads text",
                f"{text:,} text tokens * {each:,} B")]

    # --- The student has read the regions; nothing has gone backward
    sizes, key = kept_by_frozen_block(c, L, a, args.adapters, args.attention)
    names = ("norms", f"attention, {args.attention}", "MLP", "what adapters read")
    kept = of_kept(layers, masks, "mask tokens", dict(zip(names, sizes)))
    kept += of_kept(layers, B * L, "tokens", {"keys and values": key})
    each = where_and_mask(c, L, a)
    kept += [
        (16 * C * M, "hidden states at the slots", f"{M:,} slots * 16 B * {C:,}"),
        (masks * each, "rotations and masks", f"{masks:,} mask tokens * {each:,} B"),
    ]
    if args.dtype == "bf16":
        kept.append((2 * counts.copied, "autocast: bf16 copies of the adapters",
                     f"2 B * {counts.copied:,}"))

    # Then come three moments, the worst of which counts. Logits; the loss, which has its own in one
    # place, but wants the frozen head in fp32; a block, the teacher's, or else one going backward
    m, logits, loss = min(mtp.CHUNK, M), logits_of(M, V, a), 4
    copy = 4 * V * C if args.dtype == "bf16" else 0
    if args.targets == "soft":                              # p_T, log p_S and a gradient
        loss, copy = 12, 0
    work = working(c, L, a, args.attention)
    if args.targets == "ground-truth":                      # no teacher; A's gradient is fp32
        work = going_backward(c, a) + (4 - a) * c.intermediate_size
    kept.append(max(
        (logits, "worst moment: logits", f"{logits / V / m:.1f} B * {m:,} slots * {V:,}"),
        (loss * V * m + copy, "worst moment: the loss, and an fp32 head" if copy else
         "worst moment: the loss", f"{loss} B * {m:,} slots * {V:,} + {copy:,} B"),
        (masks * work, "worst moment: a block", f"{masks:,} mask tokens * {work:,} B")))

    # --- Or else the end of the backward pass
    return held, [before + reading, before + kept, [gradients]]


def of_heads(args, c, counts, micro):
    """Training of heads on a frozen model, the backbone."""
    P, K, T = counts.model, args.heads, max(args.heads + 1, args.seq_len)
    B, passes = shapes(args, micro)[:2]
    V, C = c.vocab_size, c.hidden_size
    n, a = min(args.draft_vocab, V) or V, DTYPES[args.dtype].itemsize
    top = min(args.kl_top, n)
    # Head d reads all but d tokens of a text, and has as many fewer slots
    N = B * (args.seq_len - args.prompt_tokens)             # starts of drafting
    first = K // 2 + 1 if args.extend else 1                # of those that are trained
    tokens = sum(B * (T - d) for d in range(first, K + 1))
    slots = sum(max(0, N - B * d) for d in range(first, K + 1))

    # --- What is there all the time
    held = [
        (a * P, f"frozen weights, {args.dtype}", f"{a} B * {P:,}"),
        (4 * counts.added, "heads, fp32", f"4 B * {counts.added:,}"),
        (8 * counts.trained, "AdamW's two moments, fp32", f"8 B * {counts.trained:,}"),
        (passes * (B * T * 8 + N * (8 + 16 * K)), "a step's batches",
         f"{passes} passes * ({B * T:,} tokens * 8 B + {N:,} starts * {8 + 16 * K} B)"),
    ]
    if n < V:
        held.append((a * n * C, "output matrix of the drafts", f"{a} B * {n:,} * {C:,}"))
    gradients = (4 * counts.trained, "gradients, fp32", f"4 B * {counts.trained:,}")
    before = [gradients] if passes > 1 else []              # of the passes before

    # --- The backbone reads the texts, one at a time, and says what it would write
    states = (a * C * (B * T + N), "the model's last hidden states",
              f"({B * T:,} tokens + {N:,} starts) * {a} B * {C:,}")
    likeliest = (12 * top * N, "the model's likeliest tokens", f"{N:,} starts * {top} * 12 B")
    each = working(c, T, a, args.attention) + where_and_mask(c, T, a) + T       # mask as bool
    logits = logits_of(N, V, a)
    one_text = [(T * each, "worst moment: a block reads a text", f"{T:,} tokens * {each:,} B")]
    choices = [likeliest, (logits, "worst moment: the model's logits",
                           f"{logits / N / V:.1f} B * {N:,} starts * {V:,}")]
    reading = [states] + max(one_text, choices, key=total)

    # --- All heads have read; nothing has gone backward
    norms, attention, mlp = kept_by_block(c, T, a, a, a == 2, args.attention)
    around, each = kept_around_block(C, a), where_and_mask(c, T // B, a)    # one mask for all texts
    kept = of_kept(1, tokens, "tokens of all heads", {
        "norms": norms, f"attention, {args.attention}": attention, "MLP": mlp,
        "around the block": around})
    kept += [
        (tokens * each, "rotations and masks", f"{tokens:,} tokens of all heads * {each:,} B"),
        (slots * (4 * C + 12 * top + 16), "read at the slots",
         f"{slots:,} slots * (4 B * {C:,} + {top} * 12 B + 16 B)"),
        (28 * N * K, "targets and drafts", f"{N:,} starts * {K} * 28 B"),
    ]
    if args.dtype == "bf16":
        kept.append((2 * counts.copied, "autocast: bf16 copies of the heads",
                     f"2 B * {counts.copied:,}"))

    # Logits: a portion's are computed again in the backward pass, beside two gradients. The last
    # head goes backward first
    m = max(1, min(mtp.CHUNK, N - B * K))
    work = going_backward(c, a)
    forward = kept + [
        states, likeliest,
        (a * C * B * T, "embedded tokens", f"{B * T:,} tokens * {a} B * {C:,}"),
        (8 * n * m, "worst moment: logits", f"8 B * {m:,} slots * {n:,}"),
    ]
    backward = kept + [max(
        (12 * n * m, "worst moment: logits go backward", f"12 B * {m:,} slots * {n:,}"),
        (B * (T - K) * work, "worst moment: a block goes backward",
         f"{B * (T - K):,} tokens * {work:,} B"))]

    # --- Or else the end of the backward pass
    return held, [before + reading, before + forward, before + backward, [gradients]]


# --------------------------------------------------------------------------------------------------
# The measurement

def random_model(kind, config, dtype, device):
    """A Transformer, or of a subclass, with random weights, as train.py has it from a file: at no
    time in another dtype."""
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device=device)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model


def random_texts(args, config):
    """A step's rows, as `encode_rows` has them: prompt and answer of the planned lengths. All
    differ, as what is kept of a text (TextCache, Backbone) would else serve for others."""
    texts = torch.randint(1, config.vocab_size - 1, (args.batch_size, args.seq_len))
    texts[:, -1] = 0                                        # the end token
    return [(args.prompt_tokens, own) for own in texts.tolist()]


def load_random(args, config, device):
    """(student, teacher), as train.py's `load_models`, `load_for_adapters` or `load_for_heads`."""
    dtype = DTYPES[args.dtype]
    if args.heads:
        heads = Heads(config, args.heads, args.loop).initialise(0).to(device)
        if args.draft_vocab:
            heads.draft_ids = torch.arange(min(args.draft_vocab, config.vocab_size))
        if args.extend:
            heads.freeze(args.heads // 2)
        return heads, Backbone(random_model(Transformer, config, dtype, device))
    if args.adapters:
        student = random_model(Adapted, config, dtype, device)
        add_adapters(student, args.adapters, mask_id=config.vocab_size - 1)
        return student, student if args.targets != "ground-truth" else None
    student, teacher = random_model(Transformer, config, torch.float32, device), None
    if args.targets != "ground-truth":
        teacher = random_model(Transformer, config, dtype, device).requires_grad_(False)
    return student, teacher


def two_steps(args, config, device):
    """Two steps of train.py in exactly the planned shapes, on random weights and texts."""
    student, teacher = load_random(args, config, device)
    optimizer = train.make_optimizer(student, args)
    mask_id = config.vocab_size - 1 if args.k > 1 and not args.heads else None
    tokenizer = SimpleNamespace(mask_id=mask_id, stop_ids={0}, end_id=0)
    for _ in range(2):                                      # the first step brings AdamW's moments,
        texts, batches = random_texts(args, config), []     # the first pass the gradients that wait
        for i in range(0, len(texts), args.micro_batch_size):
            share = texts[i:i + args.micro_batch_size]
            if args.heads:
                batch = make_head_batch(share, student, device)
            else:
                batch = mtp.make_batch(share, args.k, 0, args.stride, tokenizer, device,
                                       args.bidirectional, prefix=args.prefix_loss > 0)
            batches.append(batch)                           # a step's batches are made all at once
        for batch in batches[:2]:
            kernel = contextlib.nullcontext()
            if args.attention == "math":
                kernel = sdpa_kernel(SDPBackend.MATH)
            with kernel, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                if args.heads:
                    loss, _ = head_loss(
                        student, teacher, batch, tokenizer.mask_id, batch.truth.numel(),
                        ground_truth=args.targets == "ground-truth", kl_weight=args.kl_weight,
                        kl_top=args.kl_top)
                else:
                    loss, _ = mtp.region_loss(
                        student, teacher, batch, tokenizer, batch.truth.numel(),
                        soft=args.targets == "soft", slot1_weight=args.slot1_weight,
                        prefix_weight=args.prefix_loss,
                        prefix_tokens=max(1, len(batch.next_token)))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def most_in_tensors(args, config, device):
    """Bytes that tensors took at the same time, at most, in two steps on a CPU: the sum of all
    allocations and releases."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        two_steps(args, config, device)
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def measure(args, config, device):
    """{"tensors": bytes} and, on a CPU, {"process": bytes by which this one grew}. Call it in a
    fresh process."""
    keep_freed_memory()
    before = peak_memory(device)
    two_steps(args, config, device)
    grown = 1e9 * (peak_memory(device) - before)
    if device.type == "cuda":                               # where torch itself keeps count
        return {"tensors": grown}
    return {"tensors": most_in_tensors(args, config, device), "process": grown}


def measure_apart(args, config, device):
    """`measure` in a process of its own."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")         # else the profiler says hello on stderr
    try:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            return pool.submit(measure, args, config, device).result()
    except (torch.OutOfMemoryError, concurrent.futures.process.BrokenProcessPool):
        raise InputError("the measurement ran out of memory: lower --micro-batch-size") from None


# --------------------------------------------------------------------------------------------------
# The script

def get_args():
    """Our own flags, and with what is left of the command line train.py's: one Namespace."""
    parser = ArgumentParser(prog="-m studies.plan", description=__doc__)
    add = parser.add_argument
    add("--prompt-tokens", type=int,
        help="of each text; fewer mean more regions (a quarter of --seq-len)")
    add("--attention", choices=["fused", "repeated", "math"],
        help="fused: one kernel, as on a CPU; repeated: on CUDA, where model.py gives each query "
        "head keys and values of its own; math: where there is no kernel for that, every "
        "probability is kept (what this machine has: fused or repeated)")
    add("--gpus", type=int, default=1, help="(%(default)s)")
    add("--fsdp", action=SWITCH, default=False, help="the GPUs share weights and optimiser state")
    add("--memory", type=cli.number, nargs="+", default=[], metavar="GB",
        help="does it fit, and how large a --micro-batch-size?")
    add("--measure", action=SWITCH, default=False,
        help="run two steps of these shapes here, in a process of their own")
    add("--out", help="JSON file for the result (none)")
    own, rest = parser.parse_known_args()
    argv, sys.argv = sys.argv, ["train.py", *rest]
    try:
        args = argparse.Namespace(**vars(train.get_args()) | vars(own))     # --out, --fsdp are ours
    finally:
        sys.argv = argv

    if args.fsdp and (args.heads or args.adapters):
        raise InputError("--fsdp shares out models of which all weights are trained: leave it out "
                         "with --heads or --adapters")
    if args.extend and args.heads % 2:
        raise InputError("--extend doubles the heads that there are: --heads must be even")
    if args.attention is None:
        args.attention = "repeated" if pick_device(args.device).type == "cuda" else "fused"
    if args.measure and args.attention == "repeated" and pick_device(args.device).type != "cuda":
        raise InputError("--attention repeated is what CUDA does: leave it out with --measure")
    if args.prompt_tokens is None:
        args.prompt_tokens = args.seq_len // 4
    if not 0 < args.prompt_tokens < args.seq_len:
        raise InputError("--prompt-tokens must be at least 1 and below --seq-len")
    cli.at_least(args, gpus=1)
    if not all(0 < gigabytes < math.inf for gigabytes in args.memory):
        raise InputError("--memory must be above 0")
    if args.fsdp and args.gpus == 1:
        raise InputError("--fsdp spreads a model over several GPUs: --gpus 4 --fsdp")
    if args.measure and args.gpus > 1:
        raise InputError("--measure runs a single process: leave out --gpus")
    if args.out:
        output_file(args.out)
    return args


def in_words(args, config, counts):
    """What is trained, and what a pass reads."""
    B, passes, R, L, M, _ = shapes(args, args.micro_batch_size)
    line = f"{args.model}: {counts.model:,} parameters, {args.dtype}; "
    if counts.added:
        what = f"{args.heads} heads" if args.heads else f"adapters of rank {args.adapters}"
        line += f"{what}: {counts.added:,} more"
        line += f", {counts.trained:,} of them trained; " if args.extend else "; "
    if args.heads:
        starts = B * (args.seq_len - args.prompt_tokens)
        line += f"a pass: {B} sequences * {args.seq_len} tokens, drafts behind {starts:,} of them"
    else:
        line += (f"a pass: {B} sequences * ({args.seq_len} text tokens + {R} regions * "
                 f"{args.k - 1} mask tokens) = {B * L:,} fed tokens, {M:,} slots")
    return f"{line}; passes a step: {passes}\n"


def largest_micro_batch(args, config, counts, room):
    """The largest --micro-batch-size whose estimate is at most `room` bytes; 0: none."""
    for size in range(-(-args.batch_size // args.gpus), 0, -1):
        if total(estimate(args, config, counts, size)) <= room:
            return size
    return 0


def main():
    args = get_args()
    device = pick_device(args.device)
    args.dtype = dtype_name(pick_dtype(args.dtype, device))
    config = load_config(args.model)
    context = config.max_position_embeddings
    if args.seq_len > context:
        raise InputError(f"--seq-len {args.seq_len} is beyond the context of {context} tokens")

    # --- the estimate
    counts = count_parameters(config, args)
    rows = estimate(args, config, counts, args.micro_batch_size)
    print(in_words(args, config, counts))
    for size, what, arithmetic in rows:
        print(f"{size / 1e9:8.3f} GB  {what:<46}{arithmetic}")
    each = f", on each of {args.gpus} GPUs" if args.gpus > 1 else ""
    print(f"{total(rows) / 1e9:8.3f} GB  in all{each}")
    if args.heads and args.keep_gb:
        print(f"{args.keep_gb:8.3f} GB  more of the CPU's memory, at most: --keep-gb")
    record = {"estimated_bytes": total(rows), "rows": rows, "largest_micro_batch_size": {}}

    # --- does it fit?
    for gigabytes in args.memory:
        room = (1 - SPARE) * gigabytes * 1e9
        best = largest_micro_batch(args, config, counts, room)
        record["largest_micro_batch_size"][f"{gigabytes:g}"] = best
        verdict = "fits" if total(rows) <= room else "does not fit"
        if best:
            largest = f"the largest --micro-batch-size that does: {best}"
        else:
            least = total(estimate(args, config, counts, 1))
            largest = f"not even --micro-batch-size 1, {least / 1e9:.1f} GB"
        print(f"{gigabytes:6g} GB: {verdict}, {largest}")

    # --- and in truth?
    if args.measure:
        measured = record["measured_bytes"] = measure_apart(args, config, device)
        ratio = total(rows) / measured["tensors"]
        print(f"{measured['tensors'] / 1e9:8.3f} GB  measured: the estimate is {ratio:.2f} of it")
        if "process" in measured:
            print(f"{measured['process'] / 1e9:8.3f} GB  by which the process grew: its heap has "
                  "holes")
    if args.out:
        write_json(args.out, record | vars(args) | machine(device))


if __name__ == "__main__":
    cli.run(main)
