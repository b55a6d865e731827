"""
The two claims of MTP-D in miniature (arXiv 2603.23911; heads.py): does distillation make drafts
better, and does one trained head become many?

    python -m studies.cascade                           # tiny model, 21 trainings, into out-cascade
    python -m studies.cascade --resume                  # go on after Ctrl-C, or worse
    python -m studies.cascade --only joint "joint, no distillation" --seeds 2 -- --lr 2e-3
    python -m studies.cascade --model smollm2-135m --data own.jsonl --questions other.jsonl \\
        -- --draft-vocab 4096 --lr 2e-3 --batch-size 8

Every training is `python train.py --heads ...` from the same start checkpoint, on the same rows in
the same order (they follow from the seed), for the same number of steps; what stands behind `--`
goes to each of them. Then the start model answers unseen questions, and the heads draft for it:

    one head                drafts one token
    joint                   K heads, trained together
    looped, unrolled        one head's weights at all K depths, trained so
    extension               "one head", then its copy behind it trained alone, then copies of both
                            behind these, ... until there are K
    one head, repeated      "one head" at all K depths, without any training for it

"no distillation" is cross-entropy alone. No variant changes the text, and each answer is compared
with k = 1's. So what counts is how many drafts stand:

    tokens per forward      mean over questions
    cumulative acceptance   of draft j: the share of verifying passes in which drafts 1 .. j stood
    own acceptance          of draft j: that share among the passes in which drafts 1 .. j-1 stood

OUT/<variant>-<seed>/ is a training's folder, OUT/<variant>-<seed>.json what was counted, question
by question. At the end: OUT/table.md, with the claims beneath, and OUT/table.json.
"""
import math
import statistics
from pathlib import Path

import torch

from common import cli, paper
from common.answers import check_prompts
from common.cli import SWITCH, ArgumentParser, InputError
from common.data import WORD_PROBLEMS, load_data, load_questions, read_questions
from common.files import read_json, write_json, write_text
from common.hub import DEFAULT_MODEL
from common.machine import machine, pick_device
from sample import Strategy, load
from speculate import decode
from studies import keep_settings, run_script
from studies.ablate import compare, mean_and_error

# Name: train.py's flags, where K stands for --heads
TRAININGS = {
    "one head": ["--heads", 1],
    "one head, no distillation": ["--heads", 1, "--kl-weight", 0],
    "joint": ["--heads", "K"],
    "joint, no distillation": ["--heads", "K", "--kl-weight", 0],
    "looped, unrolled": ["--heads", "K", "--loop"],
    "extension": None,                                          # several trainings: see `train`
}
# Name: whose head is repeated
REPEATED = {
    "one head, repeated": "one head",
    "one head, repeated, no distillation": "one head, no distillation",
}
VARIANTS = [*TRAININGS, *REPEATED]
# What the study itself gives to train.py, or what would make another variant of each
TAKEN = ("--model", "--data", "--prompt-format", "--out", "--resume", "--seed", "--steps",
         "--heads", "--loop", "--extend", "--k", "--eval-every", "--eval-prompts", "--save-every")

# A variant, and the one that it is compared with; the draft whose cumulative acceptance is compared
# (None: they do not draft equally many; -1: the last one). What the paper found of the first one
# against the second, where we know of it, is in common/paper.py
CLAIMS = [
    ("one head", "one head, no distillation", -1),
    ("joint", "joint, no distillation", -1),
    ("one head, repeated", "one head, repeated, no distillation", 3),
    ("one head, repeated", "one head", None),
    ("extension", "one head", None),
    ("extension", "joint", -1),
    ("looped, unrolled", "joint", -1),
]
NOTE = """\
Tokens per forward, then the drafts' cumulative acceptance and, in brackets, their own, in %; +- one
standard error (over seeds or over questions, the larger one). Who drafts more starts elsewhere in
the text, so draft 1 of one head alone is not draft 1 of several. Differences are taken question by
question and seed by seed. *Steps* are those of all trainings that a variant needs: each head of the
extension has had as many as any other, one stage after the other. The paper trains backbone and
heads together, on 350B tokens; here the backbone is frozen and its own choices are the targets. The
paper's numbers are from a summary of it.
"""


# --------------------------------------------------------------------------------------------------
# The runs

def folder_of(name, seed, args):
    return Path(args.out) / f"{name.replace(',', '').replace(' ', '-')}-{seed}"


def steps_of(name, args):
    """Optimiser steps of all trainings that a variant needs."""
    stages = 1 + int(math.log2(args.heads)) if name == "extension" else 1
    return stages * args.steps


def train(name, seed, args):
    """Train a variant, or whatever is missing of it. Returns the folder of its last checkpoint."""
    out = folder_of(name, seed, args)

    def stage(out, model, *flags):
        if not (out / f"step-{args.steps}").exists():
            # the later flag wins, so that "no distillation" stays without, whatever `more` says
            run_script(
                "train.py", *args.more, "--model", model, "--data", args.data,
                "--prompt-format", args.prompt_format, "--out", out, "--seed", seed,
                "--steps", args.steps, "--cooldown", args.steps // 2, "--eval-every", 0,
                "--eval-prompts", 1, "--save-every", args.steps, "--resume",
                "--device", args.device, "--dtype", args.dtype, *flags,
                what=f"{name!r}, seed {seed}")
        return out / f"step-{args.steps}"

    if name != "extension":
        flags = [args.heads if flag == "K" else flag for flag in TRAININGS[name]]
        return stage(out, args.model, *flags)
    newest, heads = train("one head", seed, args), 1
    while heads < args.heads:
        heads *= 2
        # a draft vocabulary comes along with the first head
        newest = stage(out / f"{heads}-heads", newest, "--heads", heads, "--extend",
                       "--draft-vocab", 0)
    return newest


def answer(model, tokenizer, prompts, strategy, heads, args):
    """Answers to all prompts, batch by batch."""
    answers = []
    for first in range(0, len(prompts), args.batch_size):
        answers += decode(model, tokenizer, prompts[first:first + args.batch_size], strategy, heads,
                          max_new_tokens=args.max_new_tokens)
    return answers


def evaluate(folder, repeat, prompts, plain, device, args):
    """Let the heads in `folder` draft, their one head `repeat` times (0: as they are).

    prompts, plain  a list of ids for each question: what is asked, and what k = 1 writes
    returns         a dict for each question: tokens, passes, `stood`, a list: in how many verifying
                    passes exactly 0, 1, ... drafts stood; and whether the text is k = 1's
    In fp32: it is counted, not timed, and near-ties, which passes of different widths may resolve
    differently, are rare there.
    """
    model, tokenizer, _, heads = load(folder, device, torch.float32)
    if repeat:
        heads.loop, heads.depth = True, repeat
    K = heads.depth
    answers = answer(model, tokenizer, prompts, Strategy(K + 1, None, "heads"), heads, args)

    counted = []
    for own, text in zip(answers, plain, strict=True):
        stood = [sum(n == exactly for _, n in own.drafts) for exactly in range(K + 1)]
        counted.append({"tokens": len(own.tokens), "passes": own.passes, "stood": stood,
                        "same_text": own.tokens == text})       # what this is all about
    return counted


def finish(name, seed, *asked, args):
    """Train and evaluate one run, or whatever is missing of it. Returns what was counted.

    asked   what `evaluate` takes besides
    """
    path = folder_of(name, seed, args).with_suffix(".json")
    if not path.exists():
        folder = train(REPEATED.get(name, name), seed, args)
        repeat = args.heads if name in REPEATED else 0
        write_json(path, {**machine(pick_device(args.device)), "variant": name, "seed": seed,
                          "steps": steps_of(name, args),
                          "questions": evaluate(folder, repeat, *asked, args)})
    return read_json(path)["questions"]


# --------------------------------------------------------------------------------------------------
# What came out. A measure is "tokens per forward", ("cumulative", j) or ("own", j)

def ratio(tops, bottoms):
    """sum(tops) / sum(bottoms), a term for each question; None where there is nothing to divide by.

    Returns (the ratio, each question's pull on it): the standard error is that of the mean pull,
    which is 0. Passes of one question are alike, so it is questions that vary.
    """
    whole = sum(bottoms)
    if not whole:
        return None
    value = sum(tops) / whole
    return value, [len(tops) * (top - value * bottom) / whole for top, bottom in zip(tops, bottoms)]


def measured(questions, measure):
    """A run's questions, as `evaluate` returns them -> (value, pulls), or None: see `ratio`."""
    if measure == "tokens per forward":
        return ratio([q["tokens"] / q["passes"] for q in questions], [1] * len(questions))
    kind, j = measure
    given = 0 if kind == "cumulative" else j - 1                # so many stood at least
    return ratio([sum(q["stood"][j:]) for q in questions],
                 [sum(q["stood"][given:]) for q in questions])


def pooled(found):
    """(value, pulls) of several runs -> mean, standard error; None where no run has a value."""
    found = [own for own in found if own]
    if not found:
        return None
    return mean_and_error(
        [value for value, _ in found],
        [statistics.stdev(pulls) / math.sqrt(len(pulls)) for _, pulls in found])


def difference(runs, others, measure):
    """Of two variants' runs, with the same seeds and questions: mean difference, standard error;
    None where nothing can be compared."""
    found = []
    for run, other in zip(runs, others, strict=True):
        own, base = measured(run, measure), measured(other, measure)
        if own and base:
            pulls = [a - b for a, b in zip(own[1], base[1], strict=True)]
            found.append((own[0] - base[0], pulls))
    return pooled(found)


def drafts_of(questions):
    """How many drafts a pass of this run verifies."""
    return len(questions[0]["stood"]) - 1


def summarise(runs):
    """{variant: its runs} -> {variant: {"tokens_per_forward": (mean, error), "cumulative" and
    "own": a pair, or None, for each draft}}."""
    table = {}
    for name, own in runs.items():
        table[name] = {
            "tokens_per_forward": pooled([measured(run, "tokens per forward") for run in own])}
        for kind in ("cumulative", "own"):
            table[name][kind] = [pooled([measured(run, (kind, j)) for run in own])
                                 for j in range(1, drafts_of(own[0]) + 1)]
    return table


def claims(runs):
    """CLAIMS of which both variants are there -> a list of dicts, as table.json has them."""
    found = []
    for name, other, draft in CLAIMS:
        if not {name, other} <= runs.keys():
            continue
        most = drafts_of(runs[name][0])
        draft = most if draft == -1 else draft and min(draft, most)
        theirs = paper.HEADS.get((name, other))
        own = {"variant": name, "against": other, "paper": theirs, "draft": draft}
        measures = {"tokens per forward": "tokens per forward"}
        if draft:
            measures["cumulative acceptance"] = ("cumulative", draft)
        for what, measure in measures.items():
            pair = difference(runs[name], runs[other], measure)
            # within two standard errors nobody knows; all that the paper says is that the first one
            # is better
            own[what] = pair and {"difference": pair[0], "error": pair[1],
                                  "order": theirs and compare(pair[0], 2 * pair[1], 1)}
        found.append(own)
    return found


def in_words(claim):
    """A claim, a line of Markdown."""
    per_forward, acceptance = claim["tokens per forward"], claim.get("cumulative acceptance")
    line = "- **{variant}** against {against}: ".format(**claim)
    line += "{difference:+.3f} +- {error:.3f} tokens per forward".format(**per_forward)
    if acceptance:
        points = [100 * acceptance[key] for key in ("difference", "error")]
        line += "; cumulative acceptance of draft {}: {:+.2f} +- {:.2f} points".format(
            claim["draft"], *points)
    if not claim["paper"]:
        return f"{line}. Of the paper we know no such number."
    line += f". The paper: {claim['paper']}. Its order in tokens per forward {per_forward['order']}"
    return line + (f"; in acceptance it {acceptance['order']}." if acceptance else ".")


def markdown(table, runs, args):
    """The table, a row for each variant."""
    most = max(len(own["cumulative"]) for own in table.values())
    heads = ["variant", "seeds", "steps", "tokens per forward",
             *(f"draft {j}" for j in range(1, most + 1))]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, own in table.items():
        cells = [name, str(len(runs[name])), str(steps_of(name, args)),
                 "{:.3f} +- {:.3f}".format(*own["tokens_per_forward"])]
        for cumulative, alone in zip(own["cumulative"], own["own"]):
            pairs = ["{:.1f} +- {:.1f}".format(100 * pair[0], 100 * pair[1]) if pair else "none"
                     for pair in (cumulative, alone)]
            cells.append("{} ({})".format(*pairs))
        cells += [""] * (len(heads) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def numbers(runs):
    """Every run by itself, for table.json."""
    return {name: [{"seed": seed, **summarise({name: [run]})[name]}
                   for seed, run in enumerate(own)] for name, own in runs.items()}


# --------------------------------------------------------------------------------------------------
# The script

def get_args():
    parser = ArgumentParser(prog="-m studies.cascade", description=__doc__)
    add = parser.add_argument_group("the runs").add_argument
    add("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT",
        help="these variants, as named above (all)")
    add("--model", default=DEFAULT_MODEL, help="start checkpoint (%(default)s)")
    add("--data", default="wordproblems",
        help="to train on: wordproblems, gsm8k, metamath or a JSONL file (%(default)s)")
    cli.add_prompt_format_flag(add, default="chat where the model has a template")
    add("--heads", type=int, default=4, metavar="K",
        help="most drafts, a power of two (%(default)s)")
    add("--steps", type=int, default=150,
        help="of each training, half of them cool-down (%(default)s)")
    add("--seeds", type=int, default=3, help="runs of each variant (%(default)s)")
    add("more", nargs="*", metavar="-- FLAGS", help="behind --: more flags for each train.py")
    add = parser.add_argument_group("what to ask").add_argument
    add("--questions", help="a JSONL file, or a text with one question per line (the unseen test "
        "split of --data, where it has one)")
    add("--limit", type=int, default=64, help="the first N questions (%(default)s)")
    add("--max-new-tokens", type=int, default=96, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="questions decoded together (%(default)s)")
    add = parser.add_argument_group("files, machine").add_argument
    add("--out", default="out-cascade", help="a folder for each training, and the table "
        "(%(default)s)")
    add("--resume", action=SWITCH, default=False, help="go on with what is in --out")
    cli.add_machine_flags(add)
    args = parser.parse_args()

    cli.at_least(args, heads=2, steps=1, seeds=1, limit=1, max_new_tokens=1, batch_size=1)
    if "extension" in args.only and args.heads & (args.heads - 1):
        raise InputError(f"--heads {args.heads}: extension doubles one head until there are K: "
                         "give a power of two, or choose others with --only")
    if args.more and not args.more[0].startswith("-"):
        raise InputError(f"{args.more[0]!r}: what follows -- are flags of train.py")
    for flag in args.more:
        if flag.split("=")[0] in TAKEN:
            raise InputError(f"{flag} behind --: this study gives it to train.py itself")
    return args


def unseen_questions(args):
    """The questions to ask, a list of str. InputError where they are not other ones than --data's,
    or fewer than two."""
    if args.questions:
        if Path(args.questions).resolve() == Path(args.data).resolve():
            raise InputError(f"--questions {args.questions} is what is trained on: give other ones")
        questions = read_questions([], args.questions, 0)[:args.limit]
    elif args.data in (*WORD_PROBLEMS, "gsm8k"):
        questions = [row["question"] for row in load_questions(args.data, args.limit, 0, 0)[0]]
    else:
        raise InputError(f"--data {args.data} has no unseen questions: add --questions FILE")
    if len(questions) < 2:
        raise InputError("a single question has no spread to make errors of: ask at least two")
    return questions


def main():
    args = get_args()
    device = pick_device(args.device)

    # --- everything that can be wrong, before anything is written
    load_data(args.data, held_out=1, seed=0)
    questions = unseen_questions(args)
    model, tokenizer, _, _ = load(args.model, device, torch.float32)
    args.prompt_format = args.prompt_format or tokenizer.default_format
    prompts = [tokenizer.prompt(question, args.prompt_format) for question in questions]
    check_prompts(prompts, model)
    cli.spare(args.out, args.resume)
    out = cli.output_folder(args.out)
    names = ("model", "data", "prompt_format", "questions", "heads", "steps", "limit",
             "max_new_tokens", "more")
    settings = {name: getattr(args, name) for name in names}
    keep_settings(out, settings)

    # --- what the start model writes. It has to make room for the trainings
    if not (out / "k1.json").exists():
        answers = answer(model, tokenizer, prompts, Strategy(k=1), None, args)
        write_json(out / "k1.json", {"tokens": [own.tokens for own in answers]})
    plain = read_json(out / "k1.json")["tokens"]
    del model

    # --- the runs, seed by seed, so that every variant has one early. Each shows its own bar
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.only]
    runs = {name: [] for name in args.only}
    for number, (name, seed) in enumerate(wanted, 1):
        print(f"\n=== run {number} of {len(wanted)}: {name}, seed {seed}", flush=True)
        runs[name].append(finish(name, seed, prompts, plain, device, args=args))
        per_forward = measured(runs[name][-1], "tokens per forward")[0]
        print(f"{per_forward:.3f} tokens per forward", flush=True)

    # --- the table
    table, found = summarise(runs), claims(runs)
    same = [question["same_text"] for own in runs.values() for run in own for question in run]
    text = f"{markdown(table, runs, args)}\n{NOTE}\n" + "".join(in_words(c) + "\n" for c in found)
    text += f"\n{sum(same)} of {len(same)} answers are those of k = 1, token for token.\n"
    write_json(out / "table.json", {"settings": settings, **machine(device), "table": table,
                                    "claims": found, "runs": numbers(runs)})
    write_text(out / "table.md", text)
    print(f"\n{text}\n{out}/table.md, table.json")


if __name__ == "__main__":
    cli.run(main, resumes=True)
