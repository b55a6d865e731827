"""
What a training step costs: supervised tokens per second, share of the machine's matmul rate, peak memory. A race.

    python -m extras.efficiency                                     # the tiny model: a few minutes
    python -m extras.efficiency --model smollm2-135m --data gsm8k --before ../before --out results/efficiency-smollm2

Every contender is `python train.py` with other flags, in a process of its own, for a few steps. They take turns, one
round each, so that a machine whose speed drifts favours none; k and rows of a step are the same for all. `--before` is a
checkout of an older commit, whose train.py then runs with the same flags (git worktree add ../before COMMIT).

A *supervised token* is one slot of one region. Model-FLOPs utilisation: the arithmetic that the method asks for (student
forward and backward 3x, teacher 1x, 2 FLOP per weight and fed token, logits at supervised slots only; attention and
everything done twice not counted), per second, over the rate of a large matrix product in the same dtype.
"""
import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from extras.machine import DTYPES, machine, pick_device, pick_dtype
from model import Config, Transformer
from pretrained import ArgumentParser, InputError, at_least, read_json, resolve, run, write_json

ROOT = Path(__file__).resolve().parent.parent


def matmul_rate(device, dtype):
    """FLOP/s of the best of many large matrix products."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        (a @ b).sum().item()                                        # item: a GPU works behind our back
        best = min(best, time.perf_counter() - began)
    return 2 * 2048 ** 3 / best


def weights_of(folder):
    """(weights that every fed token is multiplied with, weights of the output matrix)."""
    with torch.device("meta"):
        model = Transformer(Config.from_dict(read_json(Path(folder) / "config.json")))
    head = model.output_matrix.numel()
    return sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.model.embed_tokens.weight.numel() - (
        0 if model.config.tie_word_embeddings else head), head


def contenders(args):
    """{name: (checkout, flags)}, in the order of the table."""
    sparse = 2 * args.k - (args.k - 1)              # the paper's density at its k_max: regions of k, S = 160 = M * 2 k_max
    before = {"before": (Path(args.before), ["--stride", "3"])} if args.before else {}
    return before | {
        "now, stride 3": (ROOT, ["--stride", "3"]),
        f"now, stride {sparse} (the paper's density)": (ROOT, ["--stride", str(sparse)]),
        "now, stride 2": (ROOT, ["--stride", "2"]),
        "now, stride 1": (ROOT, ["--stride", "1"]),
        "now, stride 1, half the micro batch": (ROOT, ["--stride", "1", "--micro-batch-size",
                                                       str(args.micro_batch_size // 2)]),
    } | ({"now, stride 1, --compile": (ROOT, ["--stride", "1", "--compile"])} if args.compile else {})


def one_round(checkout, model, flags, args):
    """Train for --steps steps. Returns the log's rows but the first (cold caches) and the peak resident memory, bytes."""
    out = tempfile.mkdtemp()
    common = ["--model", model, "--data", args.data, "--k", args.k, "--batch-size", args.batch_size,
              "--micro-batch-size", args.micro_batch_size, "--seq-len", args.seq_len, "--steps", args.steps,
              "--eval-every", 0, "--eval-prompts", 1, "--seed", args.seed, "--device", args.device, "--dtype", args.dtype]
    child = subprocess.Popen([sys.executable, str(checkout / "train.py"), *map(str, common), "--out", str(Path(out) / "run"),
                              *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    message = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise InputError(f"{checkout / 'train.py'} failed: {(message.strip().splitlines() or [status])[-1]}")
    rows = [json.loads(line) for line in open(Path(out) / "run" / "log.jsonl", encoding="utf-8")]
    shutil.rmtree(out)
    return [row for row in rows if row["event"] == "train"][1:], usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser, flag = ArgumentParser(prog="-m extras.efficiency", description=__doc__), argparse.BooleanOptionalAction
    add = parser.add_argument_group("what to train").add_argument
    add("--model", default="tiny", help="start checkpoint (%(default)s)")
    add("--data", default="wordproblems", help="as for train.py (%(default)s)")
    add("--k", type=int, default=8, help="k_max (%(default)s)")
    add("--batch-size", type=int, default=32, help="sequences per step (%(default)s)")
    add("--micro-batch-size", type=int, default=16, help="sequences per pass (%(default)s)")
    add("--seq-len", type=int, default=224, help="longest text, tokens (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add = parser.add_argument_group("the race").add_argument
    add("--before", help="a checkout of an older commit, as a contender")
    add("--compile", action=flag, default=False, help="also with torch.compile, which takes its time")
    add("--steps", type=int, default=8, help="of each round; the first does not count (%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--out", default="out-efficiency", help="folder for efficiency.json and .md (%(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--cache", help="where converted checkpoints are kept ($NANOMTP_CACHE or ~/.cache/nanomtp)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the passes (%(default)s)")
    args = parser.parse_args()
    at_least(args, k=2, batch_size=1, micro_batch_size=2, steps=2, rounds=1, seq_len=8)
    if args.before and not (Path(args.before) / "train.py").exists():
        raise InputError(f"{args.before} is no checkout of this project: git worktree add {args.before} COMMIT")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    folder = resolve(args.model, args.cache)
    body, head = weights_of(folder)

    rounds, peaks, rates = {}, {}, []
    for number in range(args.rounds):
        rates.append(matmul_rate(device, dtype))
        for name, (checkout, flags) in contenders(args).items():
            rows, peak = one_round(checkout, folder, flags, args)
            slots, fed, seconds = (sum(row[key] for row in rows) for key in ("slots", "fed_tokens", "seconds"))
            flop = 4 * 2 * (body * fed + head * slots)
            rounds.setdefault(name, []).append({"slots": slots, "fed_tokens": fed, "seconds": seconds, "flop": flop,
                                                "supervised_tokens_per_second": slots / seconds})
            peaks[name] = max(peaks.get(name, 0), peak)
            print(f"round {number + 1}, {name}: {slots / seconds:.0f} supervised tokens/s", flush=True)
    rate, table = max(rates), []
    lines = ["| step | supervised tokens/s | of the first | per fed token | GFLOP/s | of the matmul rate | peak, GB |",
             "|" + "---|" * 7]
    for name, own in rounds.items():
        speed = statistics.median(r["supervised_tokens_per_second"] for r in own)
        flops = statistics.median(r["flop"] / r["seconds"] for r in own)
        entry = {"name": name, "supervised_tokens_per_second": speed, "flop_per_second": flops, "utilisation": flops / rate,
                 "supervised_share": own[0]["slots"] / own[0]["fed_tokens"], "peak_bytes": peaks[name]}
        table.append(entry)
        lines.append(f"| {name} | {speed:.0f} | {speed / table[0]['supervised_tokens_per_second']:.2f}x | "
                     f"{entry['supervised_share']:.2f} | {flops / 1e9:.0f} | {flops / rate:.0%} | {peaks[name] / 1e9:.2f} |")
    where = machine(device)
    text = (f"{Path(args.model).name}, {args.batch_size} sequences a step, k_max {args.k}, {args.rounds} rounds of "
            f"{args.steps} steps in turns; matmul rate {rate / 1e9:.0f} GFLOP/s ({str(dtype).removeprefix('torch.')}); "
            f"{where['device']}, torch {where['torch']}, commit {where['commit']}\n\n" + "\n".join(lines) + "\n")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "efficiency.json", {**vars(args), **where, "matmul_flop_per_second": rates, "table": table,
                                         "each_round": rounds})
    (out / "efficiency.md").write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    run(main)
