"""
Every figure of this project, drawn from the raw logs in results/.

    python -m extras.figures                                    # all of them, into assets/
    python -m extras.figures --out some/folder

Each function draws one figure. Colours tell apart at every kind of colour vision (Okabe and Ito's palette).
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")               # no window
import matplotlib.pyplot as plt  # noqa: E402

from eval_gsm8k import pareto_plot  # noqa: E402
from pretrained import ArgumentParser, InputError, read_json, run  # noqa: E402

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
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


def training_curves(log):
    """Agreement with the teacher at each slot, and tokens per forward on held-out prompts, against steps."""
    rows = read_log(log)
    settings, train, held_out = rows["start"][0], rows["train"], rows["eval"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for slot in range(settings["k"]):
        # a row knows the slots of its own steps only: shorter lists, or None, where k was drawn smaller
        points = [(row["step"], row["agreement"][slot]) for row in train
                  if slot < len(row["agreement"]) and row["agreement"][slot] is not None]
        left.plot(*zip(*points), color=COLOURS[slot % len(COLOURS)], alpha=0.25, linewidth=1)
        smooth = []                                             # running mean over 25 steps, on top of the raw line
        for step, _ in points:
            near = [value for other, value in points if abs(other - step) <= 12]
            smooth.append((step, sum(near) / len(near)))
        left.plot(*zip(*smooth), color=COLOURS[slot % len(COLOURS)], linewidth=2, label=f"slot {slot + 1}")
    left.set(xlabel="step", ylabel="agreement with the teacher", ylim=(0, 1), title="training batches")
    left.legend(frameon=False)
    right.plot([row["step"] for row in held_out], [row["tokens_per_forward"] for row in held_out], marker="o",
               color=COLOURS[0], label="tokens per forward, threshold 0.9")
    right.plot([row["step"] for row in held_out], [row["agreement_with_k1"] for row in held_out], marker="s",
               color=COLOURS[1], label="share of the text before it parts from k = 1")
    right.set(xlabel="step", ylim=(0, 1.1 * max(row["tokens_per_forward"] for row in held_out)),
              title=f"{held_out[0]['prompts']} held-out prompts")
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


FIGURES = {
    "training-smollm2-gsm8k-k4.png": lambda: training_curves(RESULTS / "smollm2-gsm8k-k4" / "log.jsonl"),
    "pareto-tiny-k8.png": lambda: pareto_plot(read_json(RESULTS / "tiny-k8" / "table.json")["table"]),
}


def main():
    parser = ArgumentParser(prog="figures.py", description=__doc__)
    parser.add_argument("--out", default=str(RESULTS.parent / "assets"), help="folder for the PNG files (assets)")
    args = parser.parse_args()
    for name, draw in FIGURES.items():
        figure = draw()
        Path(args.out).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(args.out) / name, dpi=150)          # white background: readable on a dark page too
        plt.close(figure)
        print(Path(args.out) / name)


if __name__ == "__main__":
    run(main)
