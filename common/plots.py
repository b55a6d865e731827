"""The one figure that a script at the top draws: accuracy against tokens per forward."""
import matplotlib

matplotlib.use("Agg")               # no window
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]    # Okabe and Ito's


def pareto_plot(table):
    """Accuracy against tokens per forward, with standard errors; `table` as eval_gsm8k.py makes it.

    Returns a matplotlib figure.
    """
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    blue, orange, green = COLOURS[:3]
    kinds = {"static": (orange, "s"), "adaptive": (blue, "o"), "lossless": (green, "D"),
             "start": ("#000000", "*")}
    for kind, (colour, marker) in kinds.items():
        own = sorted((e for e in table if e["strategy"].startswith(kind)),
                     key=lambda e: e["tokens_per_forward"])
        if not own:
            continue
        x = [e["tokens_per_forward"] for e in own]
        y = [100 * e["accuracy"] for e in own]
        error = [100 * e["stderr"] for e in own]
        axis.errorbar(x, y, error, color=colour, marker=marker, capsize=3, label=kind)
        left = kind == "adaptive"               # labels of two lines keep apart
        for entry, at in zip(own, zip(x, y)):
            name = entry["strategy"].split(maxsplit=1)[1] if kind != "start" else "start"
            axis.annotate(name, at, fontsize=8, color=colour, textcoords="offset points",
                          xytext=(-4, -12) if left else (4, 6), ha="right" if left else "left")
    axis.set(xlabel="tokens per forward", ylabel="accuracy, %",
             title=f"{table[0]['questions']} questions")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
