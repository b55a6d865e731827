"""
How much memory does training take? An estimate of train.py's peak, component by component, before anything is loaded.

    python -m extras.plan --preset smollm2                          # the flags are those of train.py
    python -m extras.plan --preset paper --model Qwen/Qwen3-0.6B --dtype bf16 --memory 24 80        # which GPU is enough?
    python -m extras.plan --preset paper --dtype bf16 --gpus 4 --fsdp --memory 80
    python -m extras.plan --model tiny --measure --out plan.json    # beside it the peak of real steps on this machine

Every flag of train.py is understood, with its presets and defaults (python train.py --help). What changes the estimate is
--preset --model --k --stride --targets --prefix-loss --batch-size --micro-batch-size --seq-len --dtype. Only the model's
config.json is read. Planned is the longest pass: k = --k, every text as long as --seq-len, prompts of --prompt-tokens,
the rest answer, with an anchor at every --stride-th token of it. Gradient checkpointing there is none. Not counted:
--compile, evaluation, what CUDA itself and fragmentation take (a tenth of --memory is left for them). With several GPUs
the numbers are those of one of them; nobody has measured these, nor CUDA.

Shapes: B sequences of a pass, T text tokens, R regions of a sequence, L = T + R(k-1) fed tokens, M slots of the pass, V
vocabulary, C hidden size, I hidden size of the MLP, H query heads, G key/value heads, D head size. One GB is 10^9 bytes.
"""
import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from pathlib import Path

import torch

import train
from model import DTYPES, Config, Transformer, keep_freed_memory, machine, peak_memory, pick_device, pick_dtype
from pretrained import ArgumentParser, InputError, read_json, resolve, run, write_json
from regions import choose_anchors

SPARE = 0.1         # share of --memory that is left: CUDA's own (about half a GB), fragmentation, this estimate's error

# What decides about memory, out of each model's public config.json:
#                                      family   V       C     I      layers H  G  D    tied   context
KNOWN = {"smollm2-135m":              ("llama", 49152,  576,  1536,  30, 9,  3, 64,  True,  8192),
         "Qwen/Qwen3-0.6B":           ("qwen3", 151936, 1024, 3072,  28, 16, 8, 128, True,  40960),
         "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", 151936, 2560, 9728,  36, 32, 8, 128, True,  262144),
         "meta-llama/Llama-3.1-8B-Instruct": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072)}
KEYS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings")


def load_config(name, cache=None):
    """The Config of `--model`, without its weights. Raises InputError for a model that there is not."""
    if name in KNOWN:
        return Config.from_dict(dict(zip(KEYS, KNOWN[name])))
    if "/" in name and not Path(name).expanduser().exists():
        from huggingface_hub import hf_hub_download
        try:
            return Config.from_dict(read_json(hf_hub_download(name, "config.json")))
        except InputError:
            raise
        except Exception as error:                                          # whatever the hub, or no hub, comes up with
            raise InputError(f"no config.json for {name!r} here or on the hub ({type(error).__name__}); known without "
                             f"asking: tiny, {', '.join(KNOWN)}") from None
    return Config.from_dict(read_json(resolve(name, cache) / "config.json"))


def count_parameters(config):
    """(all, those of the blocks' matrices, those of one block), from a model that has shapes but no memory."""
    with torch.device("meta"):
        blocks = Transformer(config)
        model, blocks = blocks, blocks.model.layers
    linear = [p for module in blocks.modules() if isinstance(module, torch.nn.Linear) for p in module.parameters()]
    total, linear, block = (sum(p.numel() for p in group) for group in (model.parameters(), linear, blocks[0].parameters()))
    return total, linear, block


# ----------------------------------------------------------------------------------------------------------------------
# The estimate

def shapes(args, micro):
    """Of the longest pass with --micro-batch-size `micro`, on one GPU: (B, passes of a step, R, L, M, P prefix tokens)."""
    rows = -(-args.batch_size // args.gpus)                                 # sequences that a GPU sees in a step
    B = min(micro, rows)
    R = len(choose_anchors([args.prompt_tokens], [args.seq_len], 0, args.stride)[0])
    prefix = B * (args.seq_len - args.prompt_tokens) if args.prefix_loss else 0
    return B, -(-rows // B), R, args.seq_len + R * (args.k - 1), B * R * args.k, prefix


def kept_per_token(c, L, a, w, attention):
    """Bytes that autograd keeps for the backward pass, for each fed token in each layer: (norms, attention, MLP).

    a   bytes of a number inside the passes: 2 (bf16) or 4 (fp32)
    w   bytes of a number between them, in the residual stream. With autocast it stays fp32, and every linear layer makes
        its own bf16 copy of its input; FSDP casts the weights, so that w = a and the copy is shared
    """
    C, H, G, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def norm(readers):                                                      # fp32 input, 1 / rms; what weight multiplies;
        return 4 * C + 4 + w * C + a * C * (readers if w != a else 1)       # the product, once for each layer that reads it

    norms = norm(readers=3) + norm(readers=2)                               # q, k, v and gate, up
    if c.qk_norm:
        norms += (H + G) * (4 * D + 4 + a * D)
    if attention == "fused":                                                # q, k, v, output, log-sum-exp; and autocast
        attend = a * (2 * H + 2 * G) * D + 4 * H + (a * L if w != a else 0)         # casts the mask anew in every layer
    else:                                                                   # fp32 q, k, v for all H heads, H * L
        attend = 4 * 3 * H * D + 4 * H * L + a * H * D                              # probabilities, output
    return norms, attend, 4 * a * c.intermediate_size                       # gate, silu(gate), up, their product


def estimate(args, c, micro):
    """The peak as a list of (bytes, what, arithmetic): the sum is the estimate."""
    (P, linear, block), tied = count_parameters(c), c.tie_word_embeddings
    B, passes, R, L, M, prefix = shapes(args, micro)
    V, C, n, tokens, share = c.vocab_size, c.hidden_size, c.num_hidden_layers, B * L, args.gpus if args.fsdp else 1
    a = DTYPES[args.dtype].itemsize
    w = a if args.fsdp else 4
    autocast, teacher = w != a, args.targets != "ground-truth"
    over = f" / {share} GPUs" if share > 1 else ""
    held = [(4 * P / share, "student's weights, fp32", f"4 B * {P:,}{over}"),
            (8 * P / share, "AdamW's two moments, fp32", f"8 B * {P:,}{over}")]
    if teacher:
        held += [(a * P / share, f"teacher's weights, {args.dtype}", f"{a} B * {P:,}{over}")]
    if args.fsdp:                               # whole again: what is outside the blocks, from its first use on, and blocks
        roots = V * C * (1 if tied else 2) * (2 if teacher else 1)          # on their way in and out: this one and the
        held += [(a * roots + (3 * a + 4) * block, "FSDP: gathered weights, one block's gradients",     # next, gradients
                  f"{a} B * {roots:,} + {3 * a + 4} B * {block:,}")]                        # in both dtypes
    elif args.gpus > 1:
        held += [(4 * P, "DDP: gradients on their way", f"4 B * {P:,}")]

    # --- the pass before its backward pass begins; gradients of earlier passes are there already, and whole on every GPU
    # (FSDP shares them out only in the last pass of a step: parallel.average_when)
    norms, attend, mlp = kept_per_token(c, L, a, w, args.attention)
    forward = [(4 * P, f"gradients, fp32, of {passes - 1} passes before", f"4 B * {P:,}")] if passes > 1 else []
    for size, what in ((norms, "norms"), (attend, f"attention ({args.attention})"), (mlp, "MLP")):
        forward += [(tokens * n * size, f"kept for backward: {what}", f"{tokens:,} tokens * {n} layers * {size:,} B")]
    if autocast:
        forward += [(a * linear, "autocast: bf16 copies of the matrices", f"{a} B * {linear:,}")]
    rest = tokens * (2 * w * c.head_dim + (1 + w) * L) + 4 * 4 * C * (M + prefix)       # rotations, masks; hidden states
    forward += [(rest, "rotations, masks, hidden states of the slots", f"{tokens:,} tokens, {M:,} slots")]
    # and one of these moments. m, then m2: slots of the first two portions. A portion's logits live until the next one's
    # are complete; logsumexp makes a copy; bf16 logits become fp32; the head has a bf16 copy as long as autocast lasts.
    m, m2 = min(train.CHUNK, M), min(train.CHUNK, max(0, M - train.CHUNK))
    logits = max(8 * m, 4 * m + (4 if a == 4 else 6) * m2) * V + (2 * V * C if autocast else 0)
    moments = [(logits, "then: logits", f"{logits / (m * V):.0f} B * {m:,} slots * {V:,}"),
               # hard_loss has the head's gradient ready in its forward pass: one for the slots, one for the prefix (with
               # --prefix-loss 0 too), and autograd adds a third of zeros for an output that nobody uses
               (12 * V * C, "then: gradients of the head", f"3 * 4 B * {V:,} * {C:,}"),
               # inside a block: MLP and residual stream of the teacher, or their gradients; scores without a fused kernel
               (tokens * (4 * a * c.intermediate_size + 12 * C + (12 * c.num_attention_heads * L) *
                          (args.attention == "math")) + 4 * V * C, "then: one block at work", f"{tokens:,} tokens")]
    if args.targets == "soft":                                              # p_T, log p_S and the logits between them
        moments += [(12 * m * V + 8 * V * C, "then: two distributions", f"12 B * {m:,} slots * {V:,} + 8 B * {V:,} * {C:,}")]
    forward.append(max(moments))

    # --- or the end of its backward pass: all gradients, and a tied embedding's for the head and for the input
    backward = [(4 * P, "gradients, fp32", f"4 B * {P:,}")]
    if tied:
        backward += [(4 * V * C, "the embedding's gradient, a second time", f"4 B * {V:,} * {C:,}")]
    return held + max(forward, backward, key=total)


def total(rows):
    return sum(size for size, *_ in rows)


def largest_fitting(args, config, gigabytes):
    """The largest --micro-batch-size whose estimate leaves SPARE of `gigabytes`; 0: none does."""
    fits = (micro for micro in range(-(-args.batch_size // args.gpus), 0, -1)
            if total(estimate(args, config, micro)) <= (1 - SPARE) * gigabytes * 1e9)
    return next(fits, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The measurement

def measured_peak(args, config, device):
    """Bytes that two steps take, of exactly the planned shapes, in a process that did nothing before. Random weights."""
    keep_freed_memory()
    before, dtype = peak_memory(device), DTYPES[args.dtype]
    B, passes, *_ = shapes(args, args.micro_batch_size)
    with device:
        student = Transformer(config)
        teacher = Transformer(config).to(dtype).requires_grad_(False) if args.targets != "ground-truth" else None
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    mask_id = config.vocab_size - 1 if args.k > 1 else None
    batch = train.make_batch([(args.prompt_tokens, [1] * args.seq_len)] * B, args.k, 0, args.stride, mask_id, 0, device,
                             args.bidirectional, args.prefix_loss > 0)
    for _ in range(2):                                                      # AdamW's moments come with the first step
        for _ in range(min(passes, 2)):                                     # gradients that wait, with the first pass
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, prefix, *_ = train.region_loss(student, teacher, batch, mask_id, {0}, 0, args.targets == "soft")
            (loss + args.prefix_loss * prefix).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return 1e9 * (peak_memory(device) - before)


# ----------------------------------------------------------------------------------------------------------------------

def get_args():
    parser = ArgumentParser(prog="plan.py", description=__doc__)
    add = parser.add_argument
    add("--prompt-tokens", type=int, help="tokens of the prompt in each text (a quarter of --seq-len)")
    add("--attention", choices=["fused", "math"], default="fused", help="what SDPA runs: fused on a CPU, and with bf16 on "
        "H100, H200, B200 (cuDNN); torch 2.13 has no fused kernel for a mask and grouped heads on other GPUs: there it is "
        "math, which keeps every probability (%(default)s)")
    add("--gpus", type=int, default=1, help="(%(default)s)")
    add("--fsdp", action=argparse.BooleanOptionalAction, default=False, help="they share weights, teacher and optimiser")
    add("--memory", type=float, nargs="+", default=[], metavar="GB", help="of one GPU: does it fit, how many sequences?")
    add("--measure", action="store_true", help="run two steps of these shapes on this machine, in a process of their own")
    add("--out", help="JSON file for the estimate, and the measurement")
    own, rest = parser.parse_known_args()
    argv, sys.argv = sys.argv, ["train.py", *rest]
    try:
        args = argparse.Namespace(**vars(train.get_args()) | vars(own))
    finally:
        sys.argv = argv
    args.prompt_tokens = max(1, args.seq_len // 4) if args.prompt_tokens is None else args.prompt_tokens
    if not 1 <= args.prompt_tokens < args.seq_len:
        raise InputError("--prompt-tokens must be at least 1 and below --seq-len")
    if args.gpus < 1 or any(not 0 < gigabytes < float("inf") for gigabytes in args.memory):
        raise InputError("--gpus must be at least 1, --memory above 0")
    if args.fsdp and args.gpus == 1:
        raise InputError("--fsdp spreads a model over several GPUs: --gpus 4 --fsdp")
    if args.measure and args.gpus > 1:
        raise InputError("--measure runs one process: leave --gpus out")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
        raise InputError(f"--out {args.out} is a folder, or lies in one that does not exist")
    return args


def main():
    args = get_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = next(name for name, value in DTYPES.items() if value == dtype)
    config = load_config(args.model, args.cache)
    if args.seq_len > config.max_position_embeddings:
        raise InputError(f"--seq-len {args.seq_len} is beyond the model's context of {config.max_position_embeddings} tokens")
    B, passes, R, L, M, _ = shapes(args, args.micro_batch_size)
    rows = estimate(args, config, args.micro_batch_size)
    print(f"{args.model}, {count_parameters(config)[0]:,} parameters, {args.dtype} passes, "
          f"{'one GPU or CPU' if args.gpus == 1 else f'each of {args.gpus} GPUs'}\n"
          f"a pass: {B} sequences * ({args.seq_len} text tokens + {R} regions * {args.k - 1} masks) = {B * L:,} fed tokens, "
          f"{M:,} slots; {passes} {'pass' if passes == 1 else 'passes'} a step\n")
    for size, what, arithmetic in rows:
        print(f"{size / 1e9:8.3f} GB  {what:<48}{arithmetic}")
    print(f"{total(rows) / 1e9:8.3f} GB  in all")
    record = {"estimate": {what: size for size, what, _ in rows}, "estimated_bytes": total(rows)}
    for gigabytes in args.memory:
        best = largest_fitting(args, config, gigabytes)
        fits = "fits" if total(rows) <= (1 - SPARE) * gigabytes * 1e9 else "does not fit"
        smallest = total(estimate(args, config, 1)) / 1e9
        print(f"{gigabytes:g} GB: {fits}; " + (f"largest --micro-batch-size: {best}" if best else
              f"--micro-batch-size 1 takes {smallest:.1f} GB") + f" ({SPARE:.0%} left free)")
        record.setdefault("largest_micro_batch_size", {})[f"{gigabytes:g}"] = best
    if args.measure:
        try:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                record["measured_bytes"] = pool.submit(measured_peak, args, config, device).result()
        except (torch.OutOfMemoryError, concurrent.futures.process.BrokenProcessPool):
            raise InputError("this machine ran out of memory: lower --micro-batch-size") from None
        print(f"{record['measured_bytes'] / 1e9:8.3f} GB  measured: the estimate is "
              f"{total(rows) / record['measured_bytes']:.2f} of it")
    if args.out:
        out = Path(args.out)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        write_json(temporary, record | vars(args) | machine(device))
        temporary.replace(out)


if __name__ == "__main__":
    run(main)
