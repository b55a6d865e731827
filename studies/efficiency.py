"""
What a training step costs: supervised tokens per second, share of the machine's matmul rate, peak
memory. A race.

    python -m studies.efficiency                                # the tiny model: a few minutes
    python -m studies.efficiency --model smollm2-135m --data gsm8k --before ../before

Every contender is `python train.py` with other flags, in a process of its own, for a few steps.
They take turns, one round each, so that a machine whose speed drifts favours none; k and rows of a
step are the same for all. `--before` is a checkout of an older commit, whose train.py then runs
with the same flags (git worktree add ../before COMMIT).

A *supervised token* is one slot of one region. Utilisation: the arithmetic that the method asks for
(student forward and backward 3x, teacher 1x, 2 FLOP per weight and fed token, logits at supervised
slots only; attention and everything done twice not counted), per second, over the rate of a large
matrix product in the same dtype.

OUT/efficiency.md has the table, OUT/efficiency.json every round.
"""
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import cli
from common.cli import SWITCH, ArgumentParser, InputError
from common.files import read_json, write_json, write_text
from common.hub import DEFAULT_MODEL, resolve
from common.machine import dtype_name, machine, pick_device, pick_dtype
from model import Config, Transformer
from studies import ROOT


def matmul_rate(device, dtype):
    """FLOP/s of the best of many large matrix products."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        (a @ b).sum().item()                                    # item: a GPU works behind our back
        best = min(best, time.perf_counter() - began)
    return 2 * 2048 ** 3 / best


def weights_of(folder):
    """(weights that every fed token is multiplied with, weights of the output matrix)."""
    with torch.device("meta"):
        model = Transformer(Config.from_dict(read_json(Path(folder) / "config.json")))
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    return sum(p.numel() for p in matrices), model.output_matrix.numel()


def contenders(args):
    """{name: (checkout, flags)}, in the order of the table."""
    # The paper puts 2 k_max fed tokens between the starts of two regions: at k = k_max that is
    # k_max - 1 mask tokens and k_max + 1 of text
    sparse = args.k + 1
    half = ["--micro-batch-size", args.micro_batch_size // 2]
    wanted = {}
    if args.before:
        wanted["before"] = (Path(args.before), ["--stride", 3])
    wanted |= {
        "now, stride 3": (ROOT, ["--stride", 3]),
        f"now, stride {sparse} (the paper's density)": (ROOT, ["--stride", sparse]),
        "now, stride 2": (ROOT, ["--stride", 2]),
        "now, stride 1": (ROOT, ["--stride", 1]),
        "now, stride 1, half the micro batch": (ROOT, ["--stride", 1, *half]),
    }
    if args.compile:
        wanted["now, stride 1, --compile"] = (ROOT, ["--stride", 1, "--compile"])
    return wanted


def one_round(checkout, model, flags, args):
    """Train for --steps steps. Returns the log's rows but the first (cold caches) and the peak
    resident memory in bytes. Flags are those that older checkouts know as well."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, checkout / "train.py", "--out", out, "--model", model,
            "--data", args.data, "--k", args.k, "--batch-size", args.batch_size,
            "--micro-batch-size", args.micro_batch_size, "--seq-len", args.seq_len,
            "--steps", args.steps, "--eval-every", 0, "--eval-prompts", 1, "--seed", args.seed,
            "--device", args.device, "--dtype", args.dtype, *flags]
        child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
        message = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)           # what this child took, and no other
        if status:
            reason = (message.strip().splitlines() or [status])[-1]
            raise InputError(f"{checkout / 'train.py'} failed: {reason}")
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    unit = 1 if sys.platform == "darwin" else 1024
    return rows[1:], usage.ru_maxrss * unit


def counts(rows, body, head):
    """Sums over a round's rows, and what the method asks for in FLOP; see `weights_of`."""
    slots, fed, seconds = (sum(row[key] for row in rows)
                           for key in ("slots", "fed_tokens", "seconds"))
    return {"slots": slots, "fed_tokens": fed, "seconds": seconds,
            "flop": 4 * 2 * (body * fed + head * slots),
            "supervised_tokens_per_second": slots / seconds}


def summarise(rounds, peaks, rate):
    """Rounds by contender -> the table, a list of dicts: medians over rounds."""
    table = []
    for name, own in rounds.items():
        flops = statistics.median(r["flop"] / r["seconds"] for r in own)
        table.append({
            "name": name,
            "supervised_tokens_per_second": statistics.median(
                r["supervised_tokens_per_second"] for r in own),
            "flop_per_second": flops,
            "utilisation": flops / rate,
            "supervised_share": own[0]["slots"] / own[0]["fed_tokens"],
            "peak_bytes": peaks[name],
        })
    return table


def markdown(table):
    lines = ["| step | supervised tokens/s | of the first | per fed token | GFLOP/s "
             "| of the matmul rate | peak, GB |", "|" + "---|" * 7]
    first = table[0]["supervised_tokens_per_second"]
    for e in table:
        speed = e["supervised_tokens_per_second"]
        cells = [
            e["name"],
            f"{speed:.0f}",
            f"{speed / first:.2f}x",
            f"{e['supervised_share']:.2f}",
            f"{e['flop_per_second'] / 1e9:.0f}",
            f"{e['utilisation']:.0%}",
            f"{e['peak_bytes'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = ArgumentParser(prog="-m studies.efficiency", description=__doc__)
    add = parser.add_argument_group("what to train").add_argument
    add("--model", default=DEFAULT_MODEL, help="start checkpoint (%(default)s)")
    add("--data", default="wordproblems", help="as for train.py (%(default)s)")
    add("--k", type=int, default=8, help="k_max (%(default)s)")
    add("--batch-size", type=int, default=32, help="sequences per step (%(default)s)")
    add("--micro-batch-size", type=int, default=16, help="sequences per pass (%(default)s)")
    add("--seq-len", type=int, default=224, help="longest text, tokens (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add = parser.add_argument_group("the race").add_argument
    add("--before", help="a checkout of an older commit, as a contender")
    add("--compile", action=SWITCH, default=False,
        help="also with torch.compile, which takes its time")
    add("--steps", type=int, default=8,
        help="of each round; the first does not count (%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--out", default="out-efficiency",
        help="folder for efficiency.json and .md (%(default)s)")
    cli.add_machine_flags(parser.add_argument_group("machine").add_argument)
    args = parser.parse_args()
    cli.at_least(args, k=2, batch_size=1, micro_batch_size=2, steps=2, rounds=1, seq_len=8)
    if args.before and not (Path(args.before) / "train.py").exists():
        raise InputError(f"{args.before} is no checkout of this project: git worktree add "
                         f"{args.before} COMMIT")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    folder = resolve(args.model)
    body, head = weights_of(folder)
    out = cli.output_folder(args.out)

    # --- the race
    rounds, peaks, rates = {}, {}, []
    wanted = contenders(args)
    with tqdm(total=args.rounds * len(wanted), unit="run", dynamic_ncols=True) as bar:
        for _ in range(args.rounds):
            rates.append(matmul_rate(device, dtype))
            for name, (checkout, flags) in wanted.items():
                rows, peak = one_round(checkout, folder, flags, args)
                peaks[name] = max(peaks.get(name, 0), peak)
                numbers = counts(rows, body, head)
                rounds.setdefault(name, []).append(numbers)
                bar.update()
                bar.set_postfix_str(f"{name}: {numbers['supervised_tokens_per_second']:.0f} "
                                    "supervised tokens/s")

    # --- the table
    rate, where = statistics.median(rates), machine(device)
    table = summarise(rounds, peaks, rate)
    title = (f"{Path(args.model).name}, {args.batch_size} sequences a step, k_max {args.k}, "
             f"{args.rounds} rounds of {args.steps} steps in turns; matmul rate, the median of "
             f"the rounds', {rate / 1e9:.0f} "
             f"GFLOP/s ({dtype_name(dtype)}); {where['device']}, torch {where['torch']}, commit "
             f"{where['commit']}")
    text = f"{title}\n\n{markdown(table)}"
    write_json(out / "efficiency.json", {
        **vars(args), **where, "matmul_flop_per_second": rates, "table": table,
        "each_round": rounds})
    write_text(out / "efficiency.md", text)
    print("\n" + text)


if __name__ == "__main__":
    cli.run(main)
