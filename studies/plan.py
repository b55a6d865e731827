"""
How much memory does training with mask tokens take? An estimate of train.py's peak, component by
component; no weights are loaded for it.

    python -m studies.plan --preset smollm2                     # flags and defaults are train.py's
    python -m studies.plan --preset paper --model Qwen/Qwen3-0.6B --dtype bf16 --memory 24 80
    python -m studies.plan --preset paper --dtype bf16 --gpus 4 --fsdp --memory 80
    python -m studies.plan --measure --out plan.json            # beside it: the peak of real steps

Give it the flags that train.py will get (python train.py --help). What counts is --preset --model
--k --stride --targets --bidirectional --prefix-loss --slot1-weight --batch-size --micro-batch-size
--seq-len --dtype (auto: what this machine would choose). Training of heads or adapters
(--heads, --adapters) is not planned; its peak stands in the last line of its log.jsonl.

Planned is the longest pass: k = --k, texts of --seq-len tokens, of which the first --prompt-tokens
are the prompt and the others an answer with an anchor at every --stride-th token. Of several GPUs
the table is about one. It counts tensors, at the moment when there are most. On top come the CUDA
context and fragmentation or, on a CPU, the holes of glibc's heap (--measure shows by how much the
process grew); evaluation and --compile are left out.

Held against measurements on a CPU. What it says of CUDA, DDP and FSDP follows torch's source and is
not measured.

Shapes: B sequences of a pass, R regions of a sequence, L fed tokens of a sequence, M slots of a
pass, V vocabulary, C hidden size, H query heads, G key/value heads, D head size; P parameters.
1 GB is 10^9 bytes.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

import mtp
import train
from common import cli
from common.cli import SWITCH, ArgumentParser, InputError
from common.files import read_json, write_json
from common.hub import resolve
from common.machine import (
    DTYPES, dtype_name, keep_freed_memory, machine, peak_memory, pick_device, pick_dtype)
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


def count_parameters(config):
    """(of the model, of all blocks' matrices, of one block), from a model without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    groups = (model.parameters(), matrices, model.model.layers[0].parameters())
    return tuple(sum(p.numel() for p in group) for group in groups)


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


def kept(c, L, a, w, attention):
    """Bytes that autograd keeps for the backward pass, of each token in each layer: (norms,
    attention, MLP).

    a   bytes of a number inside the layers: 2 (bf16) or 4 (fp32)
    w   bytes of a number of the residual stream between them. Autocast leaves it in fp32, and every
        matrix product makes its own bf16 copy of its input; FSDP casts the weights instead: then
        w = a, and one copy serves all
    """
    C, H, G, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def norm(readers):
        # input in fp32, 1 / rms, the normalised input, and times weight, for those who read it
        return 4 * C + 4 + w * C + a * C * (1 if w == a else readers)

    norms = norm(readers=3) + norm(readers=2)                               # q, k, v and gate, up
    if c.qk_norm:
        norms += (H + G) * (4 * D + 4 + a * D)
    if attention == "fused":
        # q, k, v, output, log-sum-exp; autocast casts the mask (L) anew in every layer
        attend = a * (2 * H + 2 * G) * D + 4 * H + (0 if w == a else a * L)
    else:
        # fp32 q, k, v for all H heads; probabilities (H * L) in fp32; output
        attend = 4 * 3 * H * D + 4 * H * L + a * H * D
    return norms, attend, 4 * a * c.intermediate_size       # gate, silu(gate), up, their product


def estimate(args, c, counts, micro):
    """The peak as a list of (bytes, what, arithmetic): the sum is the estimate.

    c        the Config
    counts   what `count_parameters` says of it
    micro    sequences of a pass
    """
    P, matrices, block = counts
    B, passes, _, L, M, prefix = shapes(args, micro)
    V, C, H, D = c.vocab_size, c.hidden_size, c.num_attention_heads, c.head_dim
    layers, tokens, slots = c.num_hidden_layers, B * L, M + prefix
    a = DTYPES[args.dtype].itemsize
    w, share, over = (a, args.gpus, f" / {args.gpus} GPUs") if args.fsdp else (4, 1, "")
    autocast, teachers = w != a, 0 if args.targets == "ground-truth" else 1

    # --- What is there all the time
    held = [
        (4 * P / share, "student's weights, fp32", f"4 B * {P:,}{over}"),
        (8 * P / share, "AdamW's two moments, fp32", f"8 B * {P:,}{over}"),
        (a * P * teachers / share, f"teacher's weights, {args.dtype}",
         f"{a} B * {P * teachers:,}{over}"),
    ]
    # The batches of a step are made before its first pass: id, position and masks of every token,
    # row, place and truth of every slot
    own = 16 + (1 + args.bidirectional) * L
    held.append((passes * (tokens * own + 24 * slots), "a step's batches",
                 f"{passes} passes * ({tokens:,} tokens * {own:,} B + {slots:,} slots * 24 B)"))
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
    names = ("norms", f"attention, {args.attention}", "MLP")
    for size, what in zip(kept(c, L, a, w, args.attention), names):
        forward.append((tokens * layers * size, f"kept to go backward: {what}",
                        f"{tokens:,} tokens * {layers} layers * {size:,} B"))
    if autocast:
        forward.append((a * matrices, "autocast: bf16 copies of the matrices",
                        f"{a} B * {matrices:,}"))
    each = 2 * w * D + w * L                                # cos and sin; the mask as numbers
    forward += [
        (16 * C * slots, "hidden states at the slots", f"{slots:,} slots * 4 * 4 B * {C:,}"),
        (tokens * each, "rotations and masks", f"{tokens:,} tokens * {each:,} B"),
    ]

    # Then come three moments, the worst of which counts.
    # Logits: CHUNK slots have theirs at a time, but a portion's live until the next one's are
    # complete (m and m2 slots), logsumexp works on a copy, and bf16 logits become fp32
    m, m2 = min(mtp.CHUNK, M), max(0, min(mtp.CHUNK, M - mtp.CHUNK))
    logits = V * max(8 * m, 4 * m + (4 if a == 4 else 6) * m2)
    copy = 2 * V * C if autocast else 0                     # of the head, until the pass ends
    # The head: hard_loss has its gradient ready in the forward pass; going backward, autograd adds
    # as many zeros for an output of it that nobody uses
    again = args.slot1_weight != 1                          # slot 1 has a loss of its own, too
    heads, alone = 4 * (2 + again + (prefix > 0)), False
    if args.targets == "soft":
        # p_T, log p_S and what they come from, anew in the backward pass. Each portion has a
        # gradient for the head, in fp32 a transposed view, which autograd does not add in place
        alone = M <= mtp.CHUNK and not again and not prefix
        heads = a if alone else 8 if prefix else 3 * a
        logits = 12 * V * m + (0 if alone else a * V * C)
    # A block: inside the teacher's MLP or, without a fused kernel, at its attention scores
    scores = 12 * H * (L + D) if args.attention == "math" else 0
    work = max(a * (4 * c.intermediate_size + 3 * C), scores)
    forward.append(max(
        (logits + copy, "worst moment: logits",
         f"{logits / V / m:.1f} B * {m:,} slots * {V:,} + {copy:,} B"),
        (heads * V * C, "worst moment: the head's gradient", f"{heads} B * {V:,} * {C:,}"),
        (tokens * work + copy, "worst moment: a block",
         f"{tokens:,} tokens * {work:,} B + {copy:,} B")))

    # --- Or else its end. A tied embedding is input and head at once: two gradients are added up,
    # beside that of the passes before
    more = 0
    if c.tie_word_embeddings:
        more = V * C * (1 + (passes > 1) + (alone and not autocast))
    backward = [(4 * (P + more) / share, "gradients, fp32", f"4 B * ({P:,} + {more:,}){over}")]
    return held + max(forward, backward, key=total)


def total(rows):
    return sum(size for size, *_ in rows)


# --------------------------------------------------------------------------------------------------
# The measurement

def two_steps(args, config, device):
    """Two steps of train.py in exactly the planned shapes, on random weights and a text of ones."""
    dtype, (B, passes, *_) = DTYPES[args.dtype], shapes(args, args.micro_batch_size)
    with device:
        student, teacher = Transformer(config), None
        if args.targets != "ground-truth":
            teacher = Transformer(config).to(dtype).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    mask_id = config.vocab_size - 1 if args.k > 1 else None
    tokenizer = SimpleNamespace(mask_id=mask_id, stop_ids={0}, end_id=0)
    text = [1] * (args.seq_len - 1) + [tokenizer.end_id]
    batches = []
    for _ in range(passes):                                 # a step's batches are made all at once
        batches.append(mtp.make_batch(
            [(args.prompt_tokens, text)] * B, args.k, 0, args.stride, tokenizer, device,
            args.bidirectional, prefix=args.prefix_loss > 0))
    for _ in range(2):                                      # the first step brings AdamW's moments,
        for batch in batches[:2]:                           # the first pass the gradients that wait
            kernel = contextlib.nullcontext()
            if args.attention == "math":
                kernel = sdpa_kernel(SDPBackend.MATH)
            with kernel, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss, _ = mtp.region_loss(
                    student, teacher, batch, tokenizer, batch.truth.numel(),
                    soft=args.targets == "soft", slot1_weight=args.slot1_weight,
                    prefix_weight=args.prefix_loss, prefix_tokens=max(1, len(batch.next_token)))
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
    add("--attention", choices=["fused", "math"], default="fused",
        help="with a mask and grouped heads torch 2.13 has a fused kernel on CPUs and, in bf16, on "
        "H100, H200 and B200; on other GPUs it falls back on plain mathematics, which keeps every "
        "probability (%(default)s)")
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

    if args.heads or args.adapters:
        raise InputError("planned is training of all weights with mask tokens: leave out --heads "
                         "and --adapters")
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
    counts = count_parameters(config)
    B, passes, R, L, M, _ = shapes(args, args.micro_batch_size)
    rows = estimate(args, config, counts, args.micro_batch_size)
    print(f"{args.model}: {counts[0]:,} parameters, {args.dtype}; a pass: {B} sequences * "
          f"({args.seq_len} text tokens + {R} regions * {args.k - 1} mask tokens) = {B * L:,} fed "
          f"tokens, {M:,} slots; passes a step: {passes}\n")
    for size, what, arithmetic in rows:
        print(f"{size / 1e9:8.3f} GB  {what:<46}{arithmetic}")
    each = f", on each of {args.gpus} GPUs" if args.gpus > 1 else ""
    print(f"{total(rows) / 1e9:8.3f} GB  in all{each}")
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
