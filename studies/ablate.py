"""
The paper's ablations in miniature: the tiny model, trained and evaluated once per variant and seed.

    python -m studies.ablate                            # 19 runs of a few minutes, into out-ablate
    python -m studies.ablate --resume                   # go on after Ctrl-C, or worse
    python -m studies.ablate --only default "soft teacher"          # a look

Every run is `python train.py` with one flag more than the default's, from the same start
checkpoint, on the same rows in the same order (they follow from --seed), for the same number of
steps ("dense anchors": about the same time). Then comes `python eval_gsm8k.py`, on the same unseen
word problems for all.

At the end: OUT/table.md, the paper's tables 4 and 5 in form, and beneath it, for every variant,
whether the order that the paper found at threshold 0.9 is the order here; OUT/table.json, with
every run's own numbers.

Two variants are not quite the paper's, and the text beneath the table says so: with
`--bidirectional` the authors' anchor sees its region's mask tokens as well, while ours stays causal
on purpose; `--prefix-loss` counts the answers' tokens here, and with the authors every text token
that is no prediction place, the prompt's included.
"""
import math
import statistics
import subprocess
import sys
from pathlib import Path

from common import cli, paper
from common.cli import SWITCH, ArgumentParser, InputError
from common.files import read_json, write_json, write_text
from common.hub import DEFAULT_MODEL, resolve
from common.machine import machine, pick_device
from studies import ROOT

# Name: (flags, number of seeds, what the paper measured: accuracy in %, tokens per forward at
# threshold 0.9, on GSM8K with an 8B model; None: the paper has no such run)
VARIANTS = {
    "default": ([], 3, paper.VARIANTS["default"]),
    "soft teacher": (["--targets", "soft"], 2, paper.VARIANTS["soft teacher"]),
    "ground truth": (["--targets", "ground-truth"], 2, paper.VARIANTS["ground truth"]),
    "bidirectional": (["--bidirectional"], 2, paper.VARIANTS["bidirectional"]),
    "fixed k": (["--fixed-k"], 2, paper.VARIANTS["fixed k"]),
    "prefix loss": (["--prefix-loss", "1"], 2, paper.VARIANTS["prefix loss"]),
    "curriculum": (["--curriculum", "HALF"], 2, None),                  # HALF: of --steps
    "sparse anchors": (["--stride", "7"], 2, None),
    "dense anchors": (["--stride", "1"], 2, None),
}
# A step with a region at every token takes longer than the default's, so there are fewer: 1.6 times
# in a short trial (k_max 4, one thread); in the runs of seed 1 it was 1.8 times, a tenth more time
# for the run (results/ablation)
SHARE_OF_STEPS = {"dense anchors": 1 / 1.6}
STRATEGIES = ["k = 1", "static 2", "static 3", "adaptive 0.99", "adaptive 0.9", "adaptive 0.8"]
# Where a variant is not quite the paper's
DEPARTURES = {
    "bidirectional": "the authors' anchor sees its region's mask tokens as well; ours stays causal "
    "on purpose, so that k = 1 is untouched.",
    "prefix loss": "ours is a mean over the tokens of the answers; the authors take every text "
    "token that is no prediction place, the prompt's included.",
}


# --------------------------------------------------------------------------------------------------
# The runs

def run_script(script, *flags, what):
    """`python script flags` in a process of its own. InputError, naming `what`, if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    if subprocess.run(command).returncode:
        raise InputError(f"{script} failed for {what}, see above; --resume goes on from here")


def keep_settings(out, settings):
    """Note in OUT/settings.json what the runs there have in common; InputError for other ones."""
    path = out / "settings.json"
    was = read_json(path) if path.exists() else settings
    if was != settings:
        raise InputError(f"{out} was made with {was}: resume with the same settings, or choose "
                         "another --out")
    write_json(path, settings)


def finish(name, seed, args):
    """Train and evaluate one run, or whatever is missing of it. Returns {strategy: its entry}."""
    out = Path(args.out) / f"{name.replace(' ', '-')}-{seed}"
    table = out / "eval" / "table.json"
    if not table.exists():
        steps = max(1, round(args.steps * SHARE_OF_STEPS.get(name, 1)))
        own = [steps // 2 if flag == "HALF" else flag for flag in VARIANTS[name][0]]
        both = ["--resume", "--device", args.device, "--dtype", args.dtype]
        what = f"{name!r}, seed {seed}"
        run_script(
            "train.py", "--model", args.model, "--out", out, "--seed", seed, "--k", args.k,
            "--steps", steps, "--cooldown", steps // 2, "--eval-every", 0, *own, *both, what=what)
        run_script(
            "eval_gsm8k.py", "--model", out, "--out", table.parent, "--data", "wordproblems",
            "--limit", args.limit, "--k", 1, 2, 3, "--threshold", 0.99, 0.9, 0.8, *both, what=what)
    return {entry["strategy"]: entry for entry in read_json(table)["table"]}


# --------------------------------------------------------------------------------------------------
# What came out

def mean_and_error(values, errors):
    """Mean over runs, and its standard error.

    The error comes from the spread between runs or, where that is larger, from the runs' own
    errors, which know only the number of problems. Two or three runs tell little about their
    spread.
    """
    own = math.sqrt(sum(error ** 2 for error in errors)) / len(errors)
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), max(own, between)


def summarise(runs):
    """{variant: its runs} -> {variant: {strategy: four numbers}}.

    runs      each a dict of entries by strategy, as `finish` returns it
    returns   accuracy in % and its error, tokens per forward and its error
    """
    table = {}
    for name, own_runs in runs.items():
        table[name] = {}
        for strategy in STRATEGIES:
            own = [by_strategy[strategy] for by_strategy in own_runs]
            accuracy = mean_and_error(
                [100 * e["accuracy"] for e in own], [100 * e["stderr"] for e in own])
            per_forward = mean_and_error(
                [e["tokens_per_forward"] for e in own],
                [e["tokens_per_forward_std"] / math.sqrt(e["questions"]) for e in own])
            table[name][strategy] = (*accuracy, *per_forward)
    return table


def compare(difference, error, theirs):
    """Is the sign of our difference the paper's? Within two standard errors nobody knows."""
    if abs(difference) <= 2 * error:
        return "is undecided"
    return "holds" if difference * theirs > 0 else "does not hold"


def against_default(table, name):
    """How a variant differs from the default at threshold 0.9, and from the paper's difference.

    Returns (points, error, tokens per forward, error), and for both of them whether the paper's
    order is ours: two phrases, or None where the paper has no such run.
    """
    default, own = (table[variant]["adaptive 0.9"] for variant in ("default", name))
    points, per_forward = own[0] - default[0], own[2] - default[2]
    points_error = math.hypot(own[1], default[1])
    per_forward_error = math.hypot(own[3], default[3])
    theirs, base = VARIANTS[name][2], VARIANTS["default"][2]
    order = theirs and (compare(points, points_error, theirs[0] - base[0]),
                        compare(per_forward, per_forward_error, theirs[1] - base[1]))
    return (points, points_error, per_forward, per_forward_error), order


def orderings(table):
    """A line for each variant: how it differs from the default at threshold 0.9, there and here."""
    lines, base = [], VARIANTS["default"][2]
    for name in table:
        if name == "default":
            continue
        difference, order = against_default(table, name)
        line = f"- **{name}** against the default: " + (
            "{:+.1f} +- {:.1f} points, {:+.2f} +- {:.2f} tokens per forward.".format(*difference))
        if order is None:
            lines.append(f"{line} The paper has no such run.")
            continue
        theirs = VARIANTS[name][2]
        lines.append(f"{line} The paper: {theirs[0] - base[0]:+.1f} points, "
                     f"{theirs[1] - base[1]:+.1f}. Its order in accuracy {order[0]}; in tokens per "
                     f"forward it {order[1]}.")
    return "\n".join(lines)


def markdown(table, runs):
    """The table: accuracy in % @ tokens per forward, with errors. At the end the paper's at 0.9,
    and whether its order of variant and default holds here."""
    heads = ["variant", "runs", *STRATEGIES, "paper, 0.9", "its order of accuracy",
             "of tokens per forward"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, own in table.items():
        theirs, order = VARIANTS[name][2], None
        if name != "default" and "default" in table:
            order = against_default(table, name)[1]
        cells = [name, str(len(runs[name]))]
        for strategy in STRATEGIES:
            cells.append("{:.1f} +- {:.1f} @ {:.2f} +- {:.2f}".format(*own[strategy]))
        cells.append("{:.1f} @ {:.1f}".format(*theirs) if theirs else "")
        cells += [verdict.removeprefix("is ") for verdict in order or ("", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# The script

def main():
    parser = ArgumentParser(prog="-m studies.ablate", description=__doc__)
    add = parser.add_argument_group("the runs").add_argument
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants (all)")
    add("--model", default=DEFAULT_MODEL, help="start checkpoint (%(default)s)")
    add("--k", type=int, default=4, help="k_max (%(default)s)")
    add("--steps", type=int, default=300, help="of each run, half of them cool-down (%(default)s)")
    add("--seeds", type=int, help="runs of each variant (3 of the default, 2 of the others)")
    add("--limit", type=int, default=200, help="word problems to evaluate on (%(default)s)")
    add = parser.add_argument_group("files, machine").add_argument
    add("--out", default="out-ablate", help="a folder for each run, and the table (%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on with what is in --out")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    cli.at_least(args, k=3, steps=1, seeds=1, limit=1)      # k: the table has a column for static 3
    device = pick_device(args.device)
    resolve(args.model)                                     # before anything is written
    cli.spare(args.out, args.resume)
    out = cli.output_folder(args.out)
    settings = {name: getattr(args, name) for name in ("model", "k", "steps", "limit")}
    keep_settings(out, settings)

    # --- the runs, seed by seed, so that every variant has one early. Each shows its own bar
    seeds = {name: args.seeds or VARIANTS[name][1] for name in args.only}
    wanted = [(name, seed) for seed in range(max(seeds.values())) for name in args.only
              if seed < seeds[name]]
    runs = {name: [] for name in args.only}
    for number, (name, seed) in enumerate(wanted, 1):
        print(f"\n=== run {number} of {len(wanted)}: {name}, seed {seed}", flush=True)
        runs[name].append(finish(name, seed, args))

    # --- the table
    table = summarise(runs)
    text = markdown(table, runs)
    if "default" in table:
        text += "\n" + orderings(table) + "\n"
    for name, departure in DEPARTURES.items():
        if name in table:
            text += f"\nNot quite the paper's {name}: {departure}\n"
    write_json(out / "table.json",
               {"settings": settings, **machine(device), "table": table, "runs": runs})
    write_text(out / "table.md", text)
    print(f"\n{text}\n{out}/table.md, table.json")


if __name__ == "__main__":
    cli.run(main, resumes=True)
