"""
The paper's ablations in miniature: the tiny model, trained and evaluated once per variant and seed.

    python -m studies.ablate --processes 2      # 30 runs of some minutes each, into out-ablate
    python -m studies.ablate --resume           # go on after Ctrl-C, or worse
    python -m studies.ablate --only default "soft teacher" --seeds 1        # a look
    python -m studies.ablate --out results/ablation --table-only            # no run: just the table

Every run is `python train.py` with one flag more than the default's, from the same start
checkpoint, on the same rows in the same order (they follow from --seed), for the same number of
steps; only the strides (sparse and dense anchors) have as many as take the default's *time*, and
the table shows the minutes of each run. Then comes `python eval_gsm8k.py`, on the same unseen word
problems for all. --processes 2 lets two runs go on beside each other, of one thread each: on two
cores both are as fast as alone. What they say is in OUT/<variant>-<seed>.txt then.

OUT/<variant>-<seed>/ is a run's folder. Its log.jsonl.gz, table.json and rows.jsonl.gz, which has
no texts, are all that the tables are made of. At the end: OUT/table.md, the paper's tables 4 and 5
in form, and beneath it, for every variant, how it differs from the default at threshold 0.9 and
whether the paper's order is the order here; OUT/table.json has the same numbers.

A difference is taken question by question and seed by seed; its interval (common/intervals.py)
allows for other trainings and for other questions, and all intervals hold together with 95%
(Bonferroni). Five seeds (default, fixed k, ground truth, soft teacher) settle what is some 3 times
the standard deviation between seeds. Two have one degree of freedom and settle next to nothing:
what they find is a hint, and "undecided".

Two variants are not quite the paper's, and the text beneath the table says so: with
`--bidirectional` the authors' anchor sees its region's mask tokens as well, while ours stays causal
on purpose; `--prefix-loss` counts the answers' tokens here, and with the authors every text token
that is no prediction place, the prompt's included.
"""
import gzip
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import cli, paper
from common.cli import SWITCH, ArgumentParser, InputError
from common.files import read_json, write_bytes, write_json, write_text
from common.hub import DEFAULT_MODEL, resolve
from common.intervals import paired_over_seeds, t_quantile
from common.machine import machine, pick_device
from common.records import json_lines, keep_compact, read_rows
from studies import ROOT, keep_settings

# Name: (flags, number of seeds, what the paper measured: accuracy in %, tokens per forward at
# threshold 0.9, on GSM8K with an 8B model; None: the paper has no such run)
VARIANTS = {
    "default": ([], 5, paper.VARIANTS["default"]),
    "soft teacher": (["--targets", "soft"], 5, paper.VARIANTS["soft teacher"]),
    "ground truth": (["--targets", "ground-truth"], 5, paper.VARIANTS["ground truth"]),
    "bidirectional": (["--bidirectional"], 2, paper.VARIANTS["bidirectional"]),
    "fixed k": (["--fixed-k"], 5, paper.VARIANTS["fixed k"]),
    "prefix loss": (["--prefix-loss", "1"], 2, paper.VARIANTS["prefix loss"]),
    "curriculum": (["--curriculum", "HALF"], 2, None),                  # HALF: of --steps
    "sparse anchors": (["--stride", "7"], 2, None),
    "dense anchors": (["--stride", "1"], 2, None),
}
# Strides are compared at equal time: so many steps for each of the default's, which is the
# default's seconds per step over theirs. Found in the logs of an earlier ablation, those of seed 1
# (k_max 4, one thread, means over the run): 0.841 s with stride 3, 0.658 s with 7, 1.489 s with 1.
# The table's column "minutes" measures it again
SHARE_OF_STEPS = {"sparse anchors": 1.28, "dense anchors": 0.57}
STRATEGIES = ["k = 1", "static 2", "static 3", "adaptive 0.99", "adaptive 0.9", "adaptive 0.8"]
COMPARED = "adaptive 0.9"               # what the paper's tables 4 and 5 were decoded with
MEASURES = {"points": 0, "tokens per forward": 2}       # compared; where `values_of` has them
TOGETHER = 0.95                         # the level at which all their intervals hold
# Where a variant is not quite the paper's
DEPARTURES = {
    "bidirectional": "the authors' anchor sees its region's mask tokens as well; ours stays causal "
    "on purpose, so that k = 1 is untouched.",
    "prefix loss": "ours is a mean over the tokens of the answers; the authors take every text "
    "token that is no prediction place, the prompt's included.",
}
LEGEND = """\
accuracy in % @ tokens per forward by answers (the mean of each answer's own) and, in brackets,
pooled (all tokens / all passes, as the paper has it); mean over runs +- standard error, from the
spread between runs or, where that is larger, from the runs' own; minutes: of training, each run's.
"""


# --------------------------------------------------------------------------------------------------
# The runs

def folder_of(out, name, seed):
    return Path(out) / f"{name.replace(' ', '-')}-{seed}"


def next_command(name, seed, args):
    """What a run needs next, by what its folder holds: a script and its flags, or None."""
    out = folder_of(args.out, name, seed)
    if (out / "table.json").exists():
        return None
    both = ["--out", out, "--resume", "--device", args.device, "--dtype", args.dtype]
    steps = max(1, round(args.steps * SHARE_OF_STEPS.get(name, 1)))
    if not (out / f"step-{steps}").exists():
        own = [steps // 2 if flag == "HALF" else flag for flag in VARIANTS[name][0]]
        return ["train.py", "--model", args.model, "--seed", seed, "--k", args.k, "--steps", steps,
                "--cooldown", steps // 2, "--eval-every", 0, *own, *both]
    return ["eval_gsm8k.py", "--model", out, "--data", "wordproblems", "--limit", args.limit,
            "--k", 1, 2, 3, "--threshold", 0.99, 0.9, 0.8, *both]


def start(script, *flags, said=None):
    """Start `python script flags`. Returns the process.

    said   a file for what it prints; None: our own output. With a file it computes with one thread

    It has a session of its own, so that Ctrl-C at the terminal comes to us alone.
    """
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    if said is None:
        return subprocess.Popen(command, start_new_session=True)
    with cli.writing(said), open(said, "a") as file:
        return subprocess.Popen(command, start_new_session=True, stdout=file, stderr=file,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def keep(out):
    """Of a run that is evaluated: rows and log, small enough for a repository."""
    if not (out / "rows.jsonl.gz").exists():
        log = (out / "log.jsonl").read_bytes()
        write_bytes(out / "log.jsonl.gz", gzip.compress(log, mtime=0))
        keep_compact(out / "rows.jsonl", STRATEGIES[0])


def finish(wanted, args):
    """Train and evaluate all runs, or whatever is missing of them, --processes at a time.

    wanted   list of (name, seed)

    Ctrl-C, or the failure of one, ends the others too; train.py saves before it ends.
    """
    waiting, running, several = list(wanted), {}, args.processes > 1
    try:
        while waiting or running:
            for run, process in list(running.items()):
                if process.poll() == 0:
                    waiting.insert(0, run)                  # for its next command
                    del running[run]
                elif process.poll() is not None:
                    where = f"{folder_of(args.out, *run)}.txt" if several else "above"
                    raise InputError(f"{run[0]!r}, seed {run[1]}, failed, see {where}; --resume "
                                     "goes on from here")
            while waiting and len(running) < args.processes:
                run = waiting.pop(0)
                out, command = folder_of(args.out, *run), next_command(*run, args)
                if command is None:
                    keep(out)
                    continue
                print("\n=== run {} of {}: {}, seed {}: {}".format(
                    1 + wanted.index(run), len(wanted), *run, command[0]), flush=True)
                running[run] = start(*command, said=f"{out}.txt" if several else None)
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


# --------------------------------------------------------------------------------------------------
# What came out

def read_run(out):
    """What is kept of a run: {"steps", "minutes" of training, "rows": {strategy: compact rows}}."""
    rows = {}
    for (name, _), batch in read_rows(out / "rows.jsonl.gz").items():
        rows.setdefault(name, []).extend(batch)
    log = json_lines(out / "log.jsonl.gz", {"event", "step"})
    seconds = {row["step"]: row["seconds"] for row in log if row["event"] == "train"}
    steps = max(seconds)                                    # not all may be logged, nor once only
    return {"steps": steps, "minutes": statistics.fmean(seconds.values()) * steps / 60,
            "rows": {name: sorted(own, key=lambda row: row["id"]) for name, own in rows.items()}}


def read_runs(out, names=VARIANTS):
    """{variant: its runs, by seed from 0 on} of all that are whole in a folder."""
    runs = {}
    for name in names:
        seed = 0
        while (folder_of(out, name, seed) / "rows.jsonl.gz").exists():
            runs.setdefault(name, []).append(read_run(folder_of(out, name, seed)))
            seed += 1
    return runs


def values_of(rows):
    """Three lists with a number for each question, and means: accuracy in %, tokens per forward by
    answers, tokens per forward pooled.

    Of the pooled rate, tokens / passes, a question's number is the rate and how much the question
    pulls at it: (its tokens - rate * its passes) / mean passes.
    """
    tokens, passes = ([count(row) for row in rows] for count in (
        lambda row: row["tokens"], lambda row: len(row["chunks"])))
    rate, mean = sum(tokens) / sum(passes), statistics.fmean(passes)
    return ([100 * row["correct"] for row in rows],
            [n / own for n, own in zip(tokens, passes)],
            [rate + (n - rate * own) / mean for n, own in zip(tokens, passes)])


def mean_and_error(values, errors):
    """Mean over runs, and its standard error.

    The error comes from the spread between runs or, where that is larger, from the runs' own
    errors, which know only the number of problems. What to decide by is `differences`.
    """
    own = math.sqrt(sum(error ** 2 for error in errors)) / len(errors)
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), max(own, between)


def summarise(runs):
    """{variant: its runs} -> {variant: {strategy: six numbers}}.

    runs      as `read_runs` returns them
    returns   accuracy in %, tokens per forward by answers and pooled; each with its error
    """
    table = {}
    for name, own_runs in runs.items():
        table[name] = {}
        for strategy in STRATEGIES:
            cell = []
            for own in zip(*(values_of(run["rows"][strategy]) for run in own_runs)):
                errors = [statistics.stdev(values) / math.sqrt(len(values))
                          if len(values) > 1 else math.nan for values in own]
                cell += mean_and_error([statistics.fmean(values) for values in own], errors)
            table[name][strategy] = tuple(cell)
    return table


def compare(difference, half, theirs):
    """Is the sign of our difference the paper's? Nobody knows where the interval contains 0."""
    if abs(difference) <= half:
        return "is undecided"
    return "holds" if difference * theirs > 0 else "does not hold"


def differences(runs, strategy=COMPARED):
    """How every variant differs from the default, in accuracy and in pooled tokens per forward.

    runs      as `read_runs` returns them, the default's among them
    returns   {variant: {"points" and "tokens per forward": (mean, half of its interval, [the mean
              of each seed that both have])}}; and the level of each interval

    That is 1 - 0.05 / their number, so that all hold together with 95%: Bonferroni's correction,
    since Holm's, a little sharper, has verdicts and no intervals that show them.
    """
    others = [name for name in runs if name != "default"]
    level, found = 1 - (1 - TOGETHER) / max(1, len(MEASURES) * len(others)), {}
    for name in others:
        found[name] = {}
        for measure, place in MEASURES.items():
            by_seed = []                                    # question by question
            for own, base in zip(runs[name], runs["default"]):
                ours, theirs = (values_of(run["rows"][strategy])[place] for run in (own, base))
                by_seed.append([a - b for a, b in zip(ours, theirs, strict=True)])
            found[name][measure] = (*paired_over_seeds(by_seed, level),
                                    [statistics.fmean(values) for values in by_seed])
    return found, level


def orders(name, difference):
    """Whether the paper's order of a variant and the default holds here, in accuracy and in tokens
    per forward: two phrases; None where the paper has no such run."""
    theirs, base = VARIANTS[name][2], VARIANTS["default"][2]
    return theirs and tuple(compare(*difference[measure][:2], own - of_base)
                            for measure, own, of_base in zip(MEASURES, theirs, base))


def orderings(runs):
    """A line for each variant: how it differs from the default at threshold 0.9, there and here."""
    found, level = differences(runs)
    lines, base = [], VARIANTS["default"][2]
    for name, own in found.items():
        points, half, each = own["points"]
        rate, rate_half, each_rate = own["tokens per forward"]
        line = (f"- **{name}** against the default: {points:+.1f} +- {half:.1f} points "
                f"({', '.join(f'{x:+.1f}' for x in each)}), {rate:+.2f} +- {rate_half:.2f} tokens "
                f"per forward ({', '.join(f'{x:+.2f}' for x in each_rate)}).")
        verdict = orders(name, own)
        if verdict is None:
            open_ones = [measure for measure in MEASURES if abs(own[measure][0]) <= own[measure][1]]
            lines.append(f"{line} The paper has no such run. Undecided: "
                         f"{' and '.join(open_ones) or 'neither'}.")
            continue
        theirs = VARIANTS[name][2]
        lines.append(f"{line} The paper: {theirs[0] - base[0]:+.1f} points, "
                     f"{theirs[1] - base[1]:+.1f}. Its order in accuracy {verdict[0]}; in tokens "
                     f"per forward it {verdict[1]}.")
    two, five = (t_quantile(level, df) for df in (1, 4))
    note = (
        "Differences at threshold 0.9, tokens per forward pooled; in brackets each seed's. +-: an "
        f"interval of {100 * level:.2f}% for other trainings and other questions, so that all "
        f"{len(MEASURES) * len(found)} hold together with {TOGETHER:.0%}; what contains 0 "
        f"is undecided. With two seeds it reaches {two:.0f} standard errors of their mean to each "
        f"side, with five {five:.1f}: two decide next to nothing.\n")
    return note + "\n" + "\n".join(lines)


def markdown(table, runs):
    """The table, as LEGEND has it. At the end the paper's at 0.9, and whether its order of variant
    and default holds here."""
    found = differences(runs)[0] if "default" in runs else {}
    heads = ["variant", "runs", "steps", "minutes", *STRATEGIES, "paper, 0.9",
             "its order of accuracy", "of tokens per forward"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, own in table.items():
        theirs = VARIANTS[name][2]
        cells = [name, str(len(runs[name])), str(runs[name][0]["steps"]),
                 ", ".join(f"{run['minutes']:.1f}" for run in runs[name])]
        for strategy in STRATEGIES:
            accuracy, error, rate, rate_error, pooled, _ = own[strategy]
            cells.append(f"{accuracy:.1f} +- {error:.1f} @ {rate:.2f} +- {rate_error:.2f} "
                         f"({pooled:.2f})")
        cells.append("{:.1f} @ {:.1f}".format(*theirs) if theirs else "")
        verdict = orders(name, found[name]) if name in found else None
        cells += [phrase.removeprefix("is ") for phrase in verdict or ("", "")]
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
    add("--steps", type=int, default=300, help="of each run but those with another stride, half of "
        "them cool-down (%(default)s)")
    add("--seeds", type=int, help="runs of each variant (5 of default, soft teacher, ground truth "
        "and fixed k, 2 of the others)")
    add("--limit", type=int, default=200, help="word problems to evaluate on (%(default)s)")
    add = parser.add_argument_group("files, machine").add_argument
    add("--out", default="out-ablate", help="a folder for each run, and the table (%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on with what is in --out")
    add("--table-only", action=SWITCH, default=False, help="no run: the table of those in --out")
    add("--processes", type=int, default=1, help="runs beside each other; more than one: of one "
        "thread each (%(default)s)")
    cli.add_machine_flags(add)
    args = parser.parse_args()
    # k: the table has a column for static 3
    cli.at_least(args, k=3, steps=1, seeds=1, limit=1, processes=1)
    device = pick_device(args.device)
    out = Path(args.out)
    if not args.table_only:
        resolve(args.model)                                 # before anything is written
        cli.spare(out, args.resume)
        cli.output_folder(out)
        names = ("model", "k", "steps", "limit")
        keep_settings(out, {name: getattr(args, name) for name in names})

        # --- the runs, seed by seed, so that every variant has one early
        seeds = {name: args.seeds or VARIANTS[name][1] for name in args.only}
        wanted = [(name, seed) for seed in range(max(seeds.values())) for name in args.only
                  if seed < seeds[name]]
        signal.signal(signal.SIGTERM, signal.default_int_handler)   # `kill`, too, ends all of them
        finish(wanted, args)

    # --- the table, of what is on disk
    runs = read_runs(out, args.only)
    if not runs:
        raise InputError(f"{out} holds no whole run of these variants")
    table = summarise(runs)
    text = f"{markdown(table, runs)}\n{LEGEND}"
    record = {"settings": read_json(out / "settings.json"), **machine(device), "table": table}
    if len(runs) > 1 and "default" in runs:
        record["differences"], record["level"] = differences(runs)
        text += f"\n{orderings(runs)}\n"
    for name, departure in DEPARTURES.items():
        if name in table:
            text += f"\nNot quite the paper's {name}: {departure}\n"
    write_json(out / "table.json", record)
    write_text(out / "table.md", text)
    print(f"\n{text}\n{out}/table.md, table.json")


if __name__ == "__main__":
    cli.run(main, resumes=True)
