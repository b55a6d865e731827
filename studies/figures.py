"""
Every figure of this project, and the example of the viewer's page, drawn from the raw logs in
results/.

    python -m studies.figures                                   # all of them, into assets/
    python -m studies.figures --out some/folder

Each function draws one figure. Colours tell apart at every kind of colour vision (Okabe and Ito's
palette).
"""
import gzip
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

from common import cli
from common.answers import Answer
from common.cli import ArgumentParser, InputError
from common.files import read_json, write_text
from common.hub import resolve
from common.plots import COLOURS, pareto_plot
from common.report import chunks_of
from common.tokenizer import Tokenizer
from mtp import TEXT, attention_mask, choose_anchors, make_layout
from studies import ROOT
from studies.viewer import page

# COLOURS, to write on in black
TINTS = ["#A6D3EE", "#F7D794", "#A9DFC9", "#EBC9DC", "#F4EFA0", "#F2B79A"]
RESULTS = ROOT / "results"


def read_log(path):
    """The rows of a log.jsonl, by event: {"train": [...], "eval": [...], ...}. A resumed step
    counts once, its last."""
    rows, path = {}, Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for line in raw.decode().splitlines():
            row = json.loads(line)
            rows.setdefault(row["event"], {})[row["step"]] = row
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no log of train.py: {error}") from None
    return {event: [by_step[step] for step in sorted(by_step)] for event, by_step in rows.items()}


def plain_axes(*axes):
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


# --------------------------------------------------------------------------------------------------
# How it works: drawn from mtp.py itself

def token_layout(length=8, anchors=(2, 5), k=3):
    """What is fed, where it stands, what it predicts: in the manner of the paper's figure, with the
    mask tokens behind the text."""
    position, region, bound, (_, place) = make_layout([length], [list(anchors)], k)
    position, region, bound = (x[0].tolist() for x in (position, region, bound))
    slot_of = {}                                        # place: (number of its region, slot)
    for n, own in enumerate(place.tolist()):
        slot_of |= {fed: (n, slot) for slot, fed in enumerate(own, 1)}

    student, teacher, answers = [], [], []
    for fed, (stands, r) in enumerate(zip(position, region)):
        n, slot = slot_of.get(fed, (None, None))
        text = f"$x_{{{stands}}}$"
        student.append(text if r == TEXT else "M")
        # in a mask token's place the teacher reads what the slot before has written
        teacher.append(text if r == TEXT else f"$y^{{{n + 1}}}_{{{slot - 1}}}$")
        answers.append("" if n is None else f"$y^{{{n + 1}}}_{{{slot}}}$")
    should_be = [answer.replace("y", "t") for answer in answers]
    nobody = [None] * len(region)
    # whose colour a cell has: an anchor is read as text, but what is written there is its region's
    reads = [r if r >= 0 else None for r in region]
    writes = [slot_of.get(fed, (None, None))[0] for fed in range(len(region))]
    rows = [
        ("the student reads", student, reads),
        ("at position", position, nobody),
        ("text it may see: up to", bound, nobody),
        ("it writes (superscript: region)", answers, writes),
        ("the teacher reads", teacher, reads),
        ("and would write: the targets", should_be, writes),
    ]

    figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
    for down, (name, cells, owners) in enumerate(rows):
        axis.text(-0.3, -down, name, ha="right", va="center", fontsize=10)
        for fed, (cell, owner) in enumerate(zip(cells, owners)):
            left = fed + (0.5 * (region[fed] + 1) if region[fed] >= 0 else 0)   # a gap before each
            colour = "white" if owner is None else TINTS[owner % len(TINTS)]
            axis.add_patch(plt.Rectangle((left, -down - 0.42), 0.92, 0.84, edgecolor="#444444",
                                         linewidth=0.6, facecolor=colour))
            axis.text(left + 0.46, -down, cell, ha="center", va="center", fontsize=10)
    axis.set(xlim=(-4.6, len(position) + 0.5 * len(anchors) + 0.3), ylim=(-len(rows) + 0.4, 0.6))
    axis.axis("off")
    return figure


def attention_masks(length=8, prompt=3):
    """Who sees whom, for two values of k and two offsets of the anchors: in the manner of the
    paper's figures."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 9), layout="constrained")
    for row, k in zip(axes, (2, 3)):
        for axis, offset in zip(row, (0, 1)):
            anchors = choose_anchors([prompt], [length], offset, stride=3)
            position, region, bound, _ = make_layout([length], anchors, k)
            seen = attention_mask(position, region, bound)[0]                   # (L, L)
            kind = torch.where(region[0] >= 0, region[0] + 2, 1)    # text: 1, regions: 2, 3, ...
            picture = torch.where(seen, kind[None, :], 0)
            most = int(kind.max())
            colours = ["#FFFFFF", "#9AA5B1", *COLOURS]
            axis.imshow(picture, cmap=ListedColormap(colours[:most + 1]), vmin=0, vmax=most)
            names = [f"x{p}" if r == TEXT else f"M{p}"
                     for p, r in zip(position[0].tolist(), region[0].tolist())]
            between = [n - 0.5 for n in range(1, len(names))]
            for set_ticks in (axis.set_xticks, axis.set_yticks):
                set_ticks(range(len(names)), names, fontsize=8)
                set_ticks(between, minor=True)
            axis.grid(which="minor", color="#DDDDDD", linewidth=0.6)
            axis.tick_params(which="both", length=0)
            listed = ", ".join(f"x{anchor}" for anchor in anchors[0])
            axis.set(title=f"k = {k}, anchors {listed}", xlabel="key", ylabel="query")
    figure.suptitle("grey: a text token that the query may see; coloured: a mask token of its own\n"
                    "region; M5 stands at position 5")
    return figure


def chunked_answer(rows, tokenizer, strategies, question=0, width=46):
    """One answer, each coloured chunk the tokens of one forward pass: in the manner of the paper's
    figure.

    rows         rows.jsonl.gz of eval_gsm8k.py
    strategies   names of strategies in it, one paragraph for each
    width        characters per line
    """
    with gzip.open(rows, "rt", encoding="utf-8") as lines:
        own = {row["strategy"]: row for row in map(json.loads, lines) if row.get("id") == question}
    own.setdefault("k = 1", own.get("static 1"))                # as older rows call it
    figure, axis = plt.subplots()
    y = 0.0
    for name in strategies:
        answer, x = Answer(tokens=own[name]["tokens"], chunks=own[name]["chunks"]), 0
        title = f"{name}: {len(answer.tokens)} tokens in {answer.passes} passes"
        axis.text(0, y, title, va="center", weight="bold")
        y -= 1.25
        for number, chunk in enumerate(chunks_of(answer)):
            for n, token in enumerate(chunk, 1):
                whole = tokenizer.decode([token])
                text = whole.replace("\n", "")
                if x + len(text) > width:
                    x, y = 0, y - 1.15
                if text:
                    axis.add_patch(plt.Rectangle((x, y - 0.48), len(text), 0.96, linewidth=0,
                                                 facecolor=TINTS[number % len(TINTS)]))
                    axis.text(x + len(text) / 2, y, text, fontsize=10, family="monospace",
                              ha="center", va="center")
                x += len(text)
                if n == len(chunk):                                     # the end of a pass
                    axis.plot([x, x], [y - 0.48, y + 0.48], color="#444444", linewidth=0.8)
                if "\n" in whole:
                    x, y = 0, y - 1.15
        y -= 1.7
    axis.set(xlim=(-0.5, width + 0.5), ylim=(y + 0.8, 0.9))
    axis.axis("off")
    figure.set_size_inches(6, 0.24 * -y)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    return figure


# --------------------------------------------------------------------------------------------------
# What came out: drawn from logs in results/

def slot_points(train, slot):
    """(steps, agreements) of one slot, from 0. A row knows the slots of its own steps only: shorter
    lists, or None, where k was drawn smaller."""
    points = [(row["step"], row["agreement"][slot]) for row in train
              if slot < len(row["agreement"]) and row["agreement"][slot] is not None]
    return zip(*points)


def running_mean(steps, values, reach=12):
    """Of each step's neighbours up to `reach` steps away, itself included."""
    means = []
    for step in steps:
        near = [value for other, value in zip(steps, values) if abs(other - step) <= reach]
        means.append(sum(near) / len(near))
    return means


def training_curves(logs):
    """Agreement with the teacher at each slot, and tokens per forward on held-out prompts, against
    steps; a row of two axes per run.

    logs   {title: path of a log.jsonl}
    """
    figure, rows = plt.subplots(len(logs), 2, figsize=(10, 3.6 * len(logs)), layout="constrained",
                                squeeze=False)
    for (left, right), (title, log) in zip(rows, logs.items()):
        events = read_log(log)
        train, held_out = events["train"], events["eval"]
        for slot in range(events["start"][0]["k"]):
            steps, values = slot_points(train, slot)
            colour = COLOURS[slot % len(COLOURS)]
            left.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            left.plot(steps, running_mean(steps, values), color=colour, linewidth=2,
                      label=f"slot {slot + 1}")
        left.set(xlabel="step", ylabel="agreement with the teacher", ylim=(0, 1), title=title)
        left.legend(frameon=False, ncols=2)

        steps = [row["step"] for row in held_out]
        right.plot(steps, [row["tokens_per_forward"] for row in held_out], marker="o",
                   color=COLOURS[0], label="tokens per forward, threshold 0.9")
        right.plot(steps, [row["agreement_with_k1"] for row in held_out], marker="s",
                   color=COLOURS[1], label="share of the text before it parts from k = 1")
        right.set(xlabel="step", ylim=(0, None), title=f"{held_out[0]['prompts']} held-out prompts")
        right.legend(frameon=False)
        plain_axes(left, right)
    return figure


def confidence_plots(path):
    """Left: is a token right as often as it is sure? Right: is an answer that is sure of itself
    also good?

    path   confidence.json of studies.confidence
    """
    record = read_json(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    for (name, bins), colour, marker in zip(record["calibration"].items(), COLOURS, "os"):
        bins = [b for b in bins if b["tokens"] >= 10]                   # fewer say nothing
        said, right_share = [b["confidence"] for b in bins], [b["agrees"] for b in bins]
        left.errorbar(said, right_share, [b["stderr"] for b in bins], color=colour, marker=marker,
                      capsize=3, label=name)
        for b in bins:
            left.annotate(b["tokens"], (b["confidence"], b["agrees"]), xytext=(4, -10),
                          textcoords="offset points", fontsize=7, color=colour)
    left.set(xlabel="said: confidence of kept tokens (mean of the bin)",
             ylabel="right: share that is the teacher's choice",
             title="said and right (numbers: tokens)")
    left.legend(frameon=False)

    answers = record["answers"]
    points = right.scatter(
        [a["confidence"] for a in answers], [a["loss"] for a in answers], s=14, alpha=0.7,
        c=[a["tokens_per_forward"] for a in answers], cmap="cividis")
    figure.colorbar(points, ax=right, label="tokens per forward")
    right.set(xlabel="mean confidence of an answer",
              ylabel="its mean loss under the teacher, nats per token",
              title=f"{len(answers)} answers: r = {record['pearson']:.2f}, by rank "
              f"{record['spearman']:.2f}")
    plain_axes(left, right)
    return figure


# --------------------------------------------------------------------------------------------------
# All of them

def answer():
    return chunked_answer(RESULTS / "tiny-k8" / "rows.jsonl.gz", Tokenizer(resolve("tiny")),
                          ["k = 1", "adaptive 0.9"])


def training_smollm2():
    return training_curves({
        "SmolLM2-135M, its own answers": RESULTS / "smollm2-masks" / "log.jsonl.gz"})


def confidence_tiny():
    return confidence_plots(RESULTS / "confidence-tiny-k8" / "confidence.json")


def pareto_tiny():
    return pareto_plot(read_json(RESULTS / "tiny-k8" / "table.json")["table"],
                       "tiny-mtp, wordproblems, 1,000 questions")


FIGURES = {
    "layout.png": token_layout,
    "masks.png": attention_masks,
    "answer.png": answer,
    "training-smollm2.png": training_smollm2,
    "confidence-tiny-k8.png": confidence_tiny,
    "pareto-tiny-k8.png": pareto_tiny,
}


def main():
    parser = ArgumentParser(prog="-m studies.figures", description=__doc__)
    parser.add_argument("--out", default=str(ROOT / "assets"),
                        help="folder for pictures and page (assets)")
    args = parser.parse_args()
    out = cli.output_folder(args.out)
    for name, draw in FIGURES.items():
        figure = draw()
        with cli.writing(out / name):           # under another name first, so that it is whole
            temporary = out / f".{name}"
            figure.savefig(temporary, dpi=150)  # white background: readable on a dark page too
            temporary.replace(out / name)
        plt.close(figure)
        print(out / name)
    shown = read_json(RESULTS / "viewer-tiny-k8" / "viewer.json")
    write_text(out / "viewer.html", page({name: shown[name] for name in ("model", "prompts")}))
    print(out / "viewer.html")


if __name__ == "__main__":
    cli.run(main)
