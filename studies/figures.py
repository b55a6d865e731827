"""
Every figure of this project, and the example of the viewer's page, drawn from the raw logs in results/.

    python -m extras.figures                                    # all of them, into assets/
    python -m extras.figures --out some/folder

Each function draws one figure. Colours tell apart at every kind of colour vision (Okabe and Ito's palette).
"""
import gzip
import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")               # no window
import matplotlib.pyplot as plt  # noqa: E402

from extras.report import chunks_of  # noqa: E402
from extras.viewer import page as viewer_page  # noqa: E402
from pretrained import ArgumentParser, InputError, read_json, run  # noqa: E402
from regions import TEXT, attention_mask, make_layout  # noqa: E402
from sample import Generation  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
TINTS = ["#A6D3EE", "#F7D794", "#A9DFC9", "#EBC9DC", "#F4EFA0", "#F2B79A"]                  # the same, to write on in black
RESULTS = Path(__file__).resolve().parent.parent / "results"


def read_log(path):
    """The rows of a log.jsonl, by event: {"train": [...], "eval": [...], ...}. A resumed step counts once, its last."""
    rows = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(row["event"], {})[row["step"]] = row
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no log of train.py: {error}") from None
    return {event: [by_step[step] for step in sorted(by_step)] for event, by_step in rows.items()}


# ----------------------------------------------------------------------------------------------------------------------
# How it works: drawn from regions.py itself

def token_layout(lengths=(8,), anchors=((2, 5),), k=3):
    """What is fed, where it stands, what it predicts: the paper's figure 2 in form, with the masks behind the text."""
    position, region, bound, (_, place) = make_layout(list(lengths), [list(row) for row in anchors], k)
    position, region, bound = (x[0].tolist() for x in (position, region, bound))
    slot_of = {at: (n, j) for n, row in enumerate(place.tolist()) for j, at in enumerate(row, 1)}
    student, teacher, answers = [], [], []
    for i, (at, r) in enumerate(zip(position, region)):
        n, j = slot_of.get(i, (None, None))
        student.append(f"$x_{{{at}}}$" if r == TEXT else "M")
        teacher.append(f"$x_{{{at}}}$" if r == TEXT else f"$y^{{{n + 1}}}_{{{j - 1}}}$")     # what slot j - 1 has written
        answers.append("" if n is None else f"$y^{{{n + 1}}}_{{{j}}}$")
    rows = [("the student reads", student), ("at position", position), ("text it may see: up to", bound),
            ("it writes", answers), ("the teacher reads", teacher),
            ("and says what should be", [a.replace("y", "t") for a in answers])]
    figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
    for y, (name, cells) in enumerate(rows):
        axis.text(-0.3, -y, name, ha="right", va="center", fontsize=10)
        for x, cell in enumerate(cells):
            owner = region[x] if region[x] >= 0 else slot_of.get(x, (None,))[0]
            coloured = y in (0, 4) and region[x] >= 0 or y in (3, 5) and owner is not None
            shift = 0.5 * (region[x] + 1) if region[x] >= 0 else 0                          # a gap in front of each region
            axis.add_patch(plt.Rectangle((x + shift, -y - 0.42), 0.92, 0.84, edgecolor="#444444", linewidth=0.6,
                                         facecolor=TINTS[owner % len(TINTS)] if coloured else "white"))
            axis.text(x + shift + 0.46, -y, cell, ha="center", va="center", fontsize=10)
    axis.set(xlim=(-4.6, len(position) + 0.5 * len(anchors[0]) + 0.3), ylim=(-len(rows) + 0.4, 0.6))
    axis.axis("off")
    return figure


def attention_masks(length=8, first=2):
    """Who sees whom, for two values of k and two offsets of the anchors: the paper's figures 3 and 4 in form."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 9), layout="constrained")
    for row, k in zip(axes, (2, 3)):
        for axis, offset in zip(row, (0, 1)):
            anchors = [list(range(first + offset, length - 1, 3))]
            position, region, bound, _ = make_layout([length], anchors, k)
            seen = attention_mask(position, region, bound)[0]                               # (L, L)
            kind = torch.where(region[0] >= 0, region[0] + 2, 1)                            # text: 1, regions: 2, 3, ...
            picture = torch.where(seen, kind[None, :], 0)
            colours = ["#FFFFFF", "#9AA5B1", *COLOURS]
            axis.imshow(picture, cmap=matplotlib.colors.ListedColormap(colours[:int(kind.max()) + 1]), vmin=0,
                        vmax=int(kind.max()))
            names = [f"x{p}" if r == TEXT else f"M{p}" for p, r in zip(position[0].tolist(), region[0].tolist())]
            axis.set_xticks(range(len(names)), names, fontsize=8)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_xticks([x - 0.5 for x in range(1, len(names))], minor=True)
            axis.set_yticks([y - 0.5 for y in range(1, len(names))], minor=True)
            axis.grid(which="minor", color="#DDDDDD", linewidth=0.6)
            axis.tick_params(which="both", length=0)
            axis.set(title=f"k = {k}, anchors {', '.join(f'x{a}' for a in anchors[0])}", xlabel="key", ylabel="query")
    figure.suptitle("grey: a text token that the query may see; coloured: a mask of its own region; M5 stands at position 5")
    return figure


def chunked_answer(rows, tokenizer_folder, strategies, question=0, width=46):
    """One answer, each coloured chunk the tokens of one forward pass: the paper's figure 1 in form.

    rows         rows.jsonl.gz of eval_gsm8k.py
    strategies   names of strategies in it, one paragraph for each
    """
    tokenizer = Tokenizer(tokenizer_folder)
    with gzip.open(rows, "rt", encoding="utf-8") as lines:
        own = {row["strategy"]: row for row in map(json.loads, lines) if row.get("id") == question}
    figure, axis = plt.subplots()
    y = 0.0
    for name in strategies:
        row, x = own[name], 0
        chunks = chunks_of(Generation(tokens=row["tokens"], chunks=row["chunks"]))
        axis.text(0, y, f"{name}: {len(row['tokens'])} tokens in {len(chunks)} passes", va="center", weight="bold")
        y -= 1.25
        for number, chunk in enumerate(chunks):
            for place, token in enumerate(chunk, 1):
                whole = tokenizer.decode([token])
                text = whole.replace("\n", "")
                if x + len(text) > width:
                    x, y = 0, y - 1.15
                if text:
                    axis.add_patch(plt.Rectangle((x, y - 0.48), len(text), 0.96, linewidth=0,
                                                 facecolor=TINTS[number % len(TINTS)]))
                    axis.text(x + len(text) / 2, y, text, fontsize=10, family="monospace", ha="center", va="center")
                x += len(text)
                if place == len(chunk):                                                     # the end of a pass
                    axis.plot([x, x], [y - 0.48, y + 0.48], color="#444444", linewidth=0.8)
                if "\n" in whole:
                    x, y = 0, y - 1.15
        y -= 1.7
    axis.set(xlim=(-0.5, width + 0.5), ylim=(y + 0.8, 0.9))
    axis.axis("off")
    figure.set_size_inches(6, 0.24 * -y)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# What came out: drawn from logs in results/

def training_curves(logs):
    """Agreement with the teacher at each slot, and tokens per forward on held-out prompts, against steps; a row per run.

    logs   {title: path of a log.jsonl}
    """
    figure, rows = plt.subplots(len(logs), 2, figsize=(10, 3.6 * len(logs)), layout="constrained", squeeze=False)
    for (left, right), (title, log) in zip(rows, logs.items()):
        events = read_log(log)
        train, held_out = events["train"], events["eval"]
        for slot in range(events["start"][0]["k"]):
            # a row knows the slots of its own steps only: shorter lists, or None, where k was drawn smaller
            points = [(row["step"], row["agreement"][slot]) for row in train
                      if slot < len(row["agreement"]) and row["agreement"][slot] is not None]
            left.plot(*zip(*points), color=COLOURS[slot % len(COLOURS)], alpha=0.25, linewidth=1)
            smooth = []                                         # running mean over 25 steps, on top of the raw line
            for step, _ in points:
                near = [value for other, value in points if abs(other - step) <= 12]
                smooth.append((step, sum(near) / len(near)))
            left.plot(*zip(*smooth), color=COLOURS[slot % len(COLOURS)], linewidth=2, label=f"slot {slot + 1}")
        left.set(xlabel="step", ylabel="agreement with the teacher", ylim=(0, 1), title=title)
        left.legend(frameon=False, ncols=2)
        right.plot([row["step"] for row in held_out], [row["tokens_per_forward"] for row in held_out], marker="o",
                   color=COLOURS[0], label="tokens per forward, threshold 0.9")
        right.plot([row["step"] for row in held_out], [row["agreement_with_k1"] for row in held_out], marker="s",
                   color=COLOURS[1], label="share of the text before it parts from k = 1")
        right.set(xlabel="step", ylim=(0, 1.8), title=f"{held_out[0]['prompts']} held-out prompts")
        right.legend(frameon=False)
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def confidence_plots(path):
    """Left: is a token right as often as it is sure? Right: is an answer that is sure of itself also good?

    path   confidence.json of extras.confidence
    """
    record = read_json(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    for (name, bins), colour, marker in zip(record["calibration"].items(), COLOURS, "os"):
        bins = [b for b in bins if b["tokens"] >= 10]                       # fewer say nothing
        left.errorbar([b["confidence"] for b in bins], [b["agrees"] for b in bins], [b["stderr"] for b in bins],
                      color=colour, marker=marker, capsize=3, label=name)
        for b in bins:
            left.annotate(b["tokens"], (b["confidence"], b["agrees"]), xytext=(4, -10), textcoords="offset points",
                          fontsize=7, color=colour)
    left.set(xlabel="confidence of kept tokens (mean of the bin)", ylabel="share that is the teacher's choice",
             title="calibration (numbers: tokens)")
    left.legend(frameon=False)
    answers = record["answers"]
    points = right.scatter([a["confidence"] for a in answers], [a["loss"] for a in answers], s=14, alpha=0.7,
                           c=[a["tokens_per_forward"] for a in answers], cmap="cividis")
    figure.colorbar(points, ax=right, label="tokens per forward")
    right.set(xlabel="mean confidence of an answer", ylabel="its mean loss under the teacher, nats per token",
              title=f"{len(answers)} answers: r = {record['pearson']:.2f}, by rank {record['spearman']:.2f}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def pareto_plot(table):
    """Accuracy against tokens per forward (the paper's figure 5 in form): static and adaptive, with standard errors.

    Returns a matplotlib figure.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for kind, colour, marker in (("static", "#E69F00", "s"), ("adaptive", "#0072B2", "o"), ("lossless", "#009E73", "D"),
                                 ("start", "#000000", "*")):
        points = sorted((e["tokens_per_forward"], 100 * e["accuracy"], 100 * e["stderr"], e["strategy"])
                        for e in table if e["strategy"].startswith(kind))
        if points:
            x, y, error, names = zip(*points)
            axis.errorbar(x, y, error, color=colour, marker=marker, capsize=3, label=kind)
            for x, y, name in zip(x, y, names):
                axis.annotate(name.split(maxsplit=1)[1] if kind != "start" else "start", (x, y), fontsize=8, color=colour,
                              xytext=(-4, -12) if kind == "adaptive" else (4, 6), textcoords="offset points",
                              horizontalalignment="right" if kind == "adaptive" else "left")
    axis.set(xlabel="tokens per forward", ylabel="accuracy, %", title=f"{table[0]['questions']} questions")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


FIGURES = {
    "layout.png": token_layout,
    "masks.png": attention_masks,
    "answer.png": lambda: chunked_answer(RESULTS / "tiny-k8" / "rows.jsonl.gz", RESULTS.parent / "checkpoints" / "tiny",
                                         ["static 1", "adaptive 0.99"]),
    "training-smollm2.png": lambda: training_curves({
        "GSM8K's answers, lr 2e-4": RESULTS / "smollm2-gsm8k-k4" / "log.jsonl",
        "its own answers, lr 1e-4": RESULTS / "smollm2-answers-lr1e-4" / "log.jsonl"}),
    "confidence-tiny-k8.png": lambda: confidence_plots(RESULTS / "confidence-tiny-k8" / "confidence.json"),
    "pareto-tiny-k8.png": lambda: pareto_plot(read_json(RESULTS / "tiny-k8" / "table.json")["table"]),
}


def main():
    parser = ArgumentParser(prog="-m extras.figures", description=__doc__)
    parser.add_argument("--out", default=str(RESULTS.parent / "assets"), help="folder for pictures and page (assets)")
    args = parser.parse_args()
    for name, draw in FIGURES.items():
        figure = draw()
        Path(args.out).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(args.out) / name, dpi=150)          # white background: readable on a dark page too
        plt.close(figure)
        print(Path(args.out) / name)
    shown = read_json(RESULTS / "viewer-tiny-k8" / "viewer.json")
    (Path(args.out) / "viewer.html").write_text(viewer_page({name: shown[name] for name in ("model", "prompts")}),
                                                encoding="utf-8")
    print(Path(args.out) / "viewer.html")


if __name__ == "__main__":
    run(main)
