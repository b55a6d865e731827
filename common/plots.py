"""The one figure that a script at the top draws: accuracy against tokens per forward."""
import math

import matplotlib

matplotlib.use("Agg")               # no window
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]    # Okabe and Ito's


def apart(places, gap):
    """Move sorted numbers so that neighbours are at least `gap` apart, each as little as can be."""
    groups = []                                     # runs of labels: [sum of their places, count]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1:
            (a, m), (b, n) = groups[-2:]
            if b / n - a / m >= gap * (m + n) / 2:
                break
            groups[-2:] = [[a + b, m + n]]          # they touch: one run around their mean
    return [total / count + gap * (i - (count - 1) / 2)
            for total, count in groups for i in range(count)]


def pareto_plot(table, title):
    """Accuracy against tokens per forward, with standard errors; `table` as eval_gsm8k.py makes it.

    Returns a matplotlib figure. At least 20 points of accuracy are in it, so that small differences
    look small; the points' names stand above the frame, where none covers another.
    """
    figure, axis = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    blue, orange, green = COLOURS[:3]
    kinds = {"static": (orange, "s"), "adaptive": (blue, "o"), "lossless": (green, "D"),
             "start": ("#000000", "*")}
    points = []
    for kind, (colour, marker) in kinds.items():
        first = ("k = 1", "static") if kind == "static" else kind
        own = sorted((e for e in table if e["strategy"].startswith(first)),
                     key=lambda e: e["tokens_per_forward"])
        x = [e["tokens_per_forward"] for e in own]
        y = [100 * e["accuracy"] for e in own]
        error = [100 * e["stderr"] for e in own]
        if own:
            axis.errorbar(x, y, error, color=colour, marker=marker, capsize=3, label=kind)
        points += zip(x, y, [e["strategy"] for e in own], [colour] * len(own))
    axis.set(xlabel="tokens per forward", ylabel="accuracy, % +- standard error")
    ends = [100 * (e["accuracy"] + sign * (e["stderr"] if e["questions"] > 1 else 0))
            for e in table for sign in (-1, 1)]
    low = max(0, 10 * math.floor(min(min(ends) - 2, max(ends) - 18) / 10))
    axis.set_ylim(low, max(max(ends) + 2, low + 20))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))

    points.sort()
    low, high = axis.get_xlim()
    labels = apart([x for x, *_ in points], gap=(high - low) / 36)
    frame = axis.get_xaxis_transform()              # x in tokens per forward, y in frame heights
    for at, (x, y, name, colour) in zip(labels, points):
        axis.annotate("", (x, y), (at, 1), xycoords="data", textcoords=frame,
                      arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6})
        axis.text(at, 1.01, name, transform=frame, color=colour, fontsize=8, rotation=90,
                  ha="center", va="bottom")
    axis.set_title(title, pad=80)                   # above the names
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
