"""
The paper's ablations in miniature: the tiny model trained once per variant and seed, all else equal, then evaluated.

    python -m extras.ablate                                     # 19 runs of about three minutes, into out-ablate
    python -m extras.ablate --resume                            # go on after Ctrl-C, or worse
    python -m extras.ablate --only default "soft teacher"      # a look

Every run is `python train.py` with one flag more than the default's, from the same start checkpoint, on the same rows in the
same order (they follow from --seed), for the same number of steps ("dense anchors": about the same time), and then
`python eval_gsm8k.py` on the same unseen word problems. At the end: OUT/table.md, with the paper's tables 3 and 4 in form,
and beneath it, for every variant, whether the order that the paper found at threshold 0.9 is the order here; OUT/table.json,
with every run's own numbers.
"""
import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from extras.machine import machine
from pretrained import ArgumentParser, InputError, at_least, read_json, run, write_json

# Name: (flags, number of seeds, what the paper measured: accuracy in %, tokens per forward at threshold 0.9, on GSM8K with
# an 8B model, section on ablations; None where the paper has no such run)
VARIANTS = {
    "default": ([], 3, (64.1, 3.3)),
    "soft teacher": (["--targets", "soft"], 2, (62.5, 2.3)),
    "ground truth": (["--targets", "ground-truth"], 2, (66.4, 2.2)),
    "bidirectional": (["--bidirectional"], 2, (59.8, 3.1)),
    "fixed k": (["--fixed-k"], 2, (51.6, 2.7)),
    "prefix loss": (["--prefix-loss", "1"], 2, (64.6, 2.7)),
    "curriculum": (["--curriculum", "HALF"], 2, None),                  # HALF: of --steps
    "sparse anchors": (["--stride", "7"], 2, None),
    "dense anchors": (["--stride", "1"], 2, None),
}
# A step with a region at every token takes longer than the default's, so there are fewer: 1.6 times in a short trial
# (k_max 4, one thread); in the runs of seed 1 it was 1.8 times, a tenth more time for the run (results/ablation).
SHARE_OF_STEPS = {"dense anchors": 1 / 1.6}
STRATEGIES = ["static 1", "static 2", "static 3", "adaptive 0.99", "adaptive 0.9", "adaptive 0.8"]
ROOT = Path(__file__).resolve().parent.parent


def finish(name, seed, args):
    """Train and evaluate one run, or whatever of it is still missing. Returns its table, one dict per strategy."""
    out = Path(args.out) / f"{name.replace(' ', '-')}-{seed}"
    if not (out / "eval" / "table.json").exists():
        print(f"\n=== {name}, seed {seed}", flush=True)
        common = ["--device", args.device, "--dtype", args.dtype]
        steps = max(1, round(args.steps * SHARE_OF_STEPS.get(name, 1)))
        own = [str(steps // 2) if flag == "HALF" else flag for flag in VARIANTS[name][0]]
        for script, *flags in (
                ["train.py", "--model", args.model, "--out", str(out), "--seed", str(seed), "--resume", "--k", str(args.k),
                 "--steps", str(steps), "--cooldown", str(steps // 2), "--eval-every", "0", *own],
                ["eval_gsm8k.py", "--model", str(out), "--out", str(out / "eval"), "--data", "wordproblems", "--resume",
                 "--limit", str(args.limit), "--k", "1", "2", "3", "--threshold", "0.99", "0.9", "0.8"]):
            if subprocess.run([sys.executable, str(ROOT / script), *flags, *common]).returncode:
                raise InputError(f"{script} failed for {name!r}, seed {seed}, see above; --resume goes on from here")
    return {entry["strategy"]: entry for entry in read_json(out / "eval" / "table.json")["table"]}


def mean_and_error(values, errors):
    """Mean over runs, and its standard error: from the spread between runs or, where that is larger, from the runs' own
    errors, which know only the number of problems. Two or three runs tell little about their spread."""
    own = math.sqrt(sum(error ** 2 for error in errors)) / len(errors)
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), max(own, between)


def summarise(runs):
    """{variant: list of tables, one per seed} -> {variant: {strategy: (accuracy in %, error, tokens per forward, error)}}"""
    table = {}
    for name, tables in runs.items():
        table[name] = {}
        for strategy in STRATEGIES:
            own = [by_strategy[strategy] for by_strategy in tables]
            per_forward_error = [e["tokens_per_forward_std"] / math.sqrt(e["questions"]) for e in own]
            table[name][strategy] = (
                *mean_and_error([100 * e["accuracy"] for e in own], [100 * e["stderr"] for e in own]),
                *mean_and_error([e["tokens_per_forward"] for e in own], per_forward_error))
    return table


def compare(difference, error, paper):
    """One half of a verdict: is the sign of our difference the paper's? Within two standard errors nobody knows."""
    if abs(difference) <= 2 * error:
        return "is undecided"
    return "holds" if difference * paper > 0 else "does not hold"


def against_default(table, name):
    """How a variant differs from the default at threshold 0.9: (points, error, tokens per forward, error), and for both
    whether the paper's order is ours; None without a run of the paper's."""
    (accuracy, error, speed, speed_error), (a, a_error, s, s_error) = (table[n]["adaptive 0.9"] for n in ("default", name))
    difference = (a - accuracy, math.hypot(error, a_error), s - speed, math.hypot(speed_error, s_error))
    paper, base = VARIANTS[name][2], VARIANTS["default"][2]
    order = paper and (compare(*difference[:2], paper[0] - base[0]), compare(*difference[2:], paper[1] - base[1]))
    return difference, order


def orderings(table):
    """One line for each variant: how it differs from the default at threshold 0.9, there and here."""
    lines, base = [], VARIANTS["default"][2]
    for name in table:
        if name == "default":
            continue
        difference, order = against_default(table, name)
        line = "- **{}** against the default: {:+.1f} +- {:.1f} points, {:+.2f} +- {:.2f} tokens per forward.".format(
            name, *difference)
        if order is None:
            lines.append(line + " The paper has no such run.")
            continue
        paper = VARIANTS[name][2]
        lines.append(f"{line} The paper: {paper[0] - base[0]:+.1f} points, {paper[1] - base[1]:+.1f}. Its order in accuracy "
                     f"{order[0]}; in tokens per forward it {order[1]}.")
    return "\n".join(lines)


def markdown(table, runs):
    """The table: accuracy in % @ tokens per forward, with errors; at the end the paper's at 0.9, and whether its order of
    variant and default holds here."""
    heads = ["variant", "runs", *STRATEGIES, "paper, 0.9", "its order of accuracy", "of tokens per forward"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, own in table.items():
        cells = ["{:.1f} +- {:.1f} @ {:.2f} +- {:.2f}".format(*own[strategy]) for strategy in STRATEGIES]
        paper, order = VARIANTS[name][2], None
        if name != "default" and "default" in table:
            order = against_default(table, name)[1]
        cells += ["{:.1f} @ {:.1f}".format(*paper) if paper else "", *(one.removeprefix("is ") for one in order or ("", ""))]
        lines.append(f"| {name} | {len(runs[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = ArgumentParser(prog="-m extras.ablate", description=__doc__)
    add = parser.add_argument_group("the runs").add_argument
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants (all)")
    add("--model", default="tiny", help="start checkpoint (%(default)s)")
    add("--k", type=int, default=4, help="k_max (%(default)s)")
    add("--steps", type=int, default=300, help="of each run, half of them cool-down (%(default)s)")
    add("--seeds", type=int, help="runs of each variant (3 of the default, 2 of the others)")
    add("--limit", type=int, default=200, help="word problems to evaluate on (%(default)s)")
    add = parser.add_argument_group("files, machine").add_argument
    add("--out", default="out-ablate", help="a folder for each run, and the table (%(default)s)")
    add("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with what is in --out")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--dtype", default="auto", help="auto, fp32, bf16 (%(default)s)")
    args = parser.parse_args()
    at_least(args, k=3, steps=1, seeds=1, limit=1)                      # k: the table has a column for static 3
    out = Path(args.out)
    if out.exists() and any(out.iterdir()) and not args.resume:
        raise InputError(f"{out} exists: add --resume to go on, or choose another --out")

    settings = {name: getattr(args, name) for name in ("model", "k", "steps", "limit")}
    out.mkdir(parents=True, exist_ok=True)
    was = read_json(out / "settings.json") if (out / "settings.json").exists() else settings
    if was != settings:
        raise InputError(f"{out} was made with {was}: resume with the same settings, or choose another --out")
    write_json(out / "settings.json", settings)
    # seed by seed, so that every variant has a run early
    wanted = [(name, seed) for seed in range(3) for name in args.only if seed < (args.seeds or VARIANTS[name][1])]
    runs = {name: [] for name in args.only}
    for name, seed in wanted:
        runs[name].append(finish(name, seed, args))
    table = summarise(runs)
    text = markdown(table, runs) + ("\n" + orderings(table) + "\n" if "default" in table else "")
    write_json(out / "table.json", {"settings": settings, **machine(torch.device("cpu")), "table": table, "runs": runs})
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{out}/table.md, table.json")


if __name__ == "__main__":
    run(main)
