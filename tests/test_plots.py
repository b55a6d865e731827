"""
common/plots.py: names that nothing covers, and axes that say what they seem to.
"""
import itertools
import json
import random

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

from common.plots import apart, pareto_plot

RUNS = ["tiny-k8", "tiny-k3", "tiny-heads4", "smollm2-masks/eval"]


@pytest.fixture(params=RUNS)
def drawn(request):
    """(table, figure, its axis) of one of our runs."""
    table = json.loads((ROOT / "results" / request.param / "table.json").read_text())["table"]
    figure = pareto_plot(table, "a model, its questions")
    figure.canvas.draw()
    yield table, figure, figure.axes[0]
    plt.close(figure)


def test_apart():
    """Neighbours that are too near move by the same way each; whoever has room stays."""
    assert apart([], 1) == [] and apart([5], 1) == [5]
    assert apart([0, 0], 1) == [-0.5, 0.5]
    assert apart([0, 0, 10], 1) == [-0.5, 0.5, 10]
    assert apart([1, 2, 3], 1) == [1, 2, 3]                     # near enough is not too near
    assert apart([0, 0.9, 1.8], 1) == pytest.approx([-0.1, 0.9, 1.9])
    assert apart([0, 1, 1], 1) == pytest.approx([-1 / 3, 2 / 3, 5 / 3])     # pushed on in turn


@pytest.mark.parametrize("seed", range(20))
def test_apart_at_random(seed):
    rng, gap = random.Random(seed), 0.7
    places = sorted(rng.uniform(0, 10) for _ in range(rng.randint(2, 14)))
    moved = apart(places, gap)
    assert len(moved) == len(places)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(moved))      # in order, too
    # alone with room for all that may be pushed from either side: it stays where it is
    room = gap * len(places)
    far = apart([places[0] - room, *places, places[-1] + room], gap)
    assert far[0] == places[0] - room and far[-1] == places[-1] + room
    assert far[1:-1] == pytest.approx(moved)
    assert sum(moved) == pytest.approx(sum(places))             # nobody drifts to one side


def test_names_do_not_overlap(drawn):
    """Each above the frame, inside the picture, apart from all others, title and legend."""
    table, figure, axis = drawn
    names = [text for text in axis.texts if text.get_text()]
    assert sorted(text.get_text() for text in names) == sorted(e["strategy"] for e in table)
    assert axis.get_title() == "a model, its questions"
    boxes = [text.get_window_extent() for text in [*names, axis.title]]
    legend = axis.get_legend().get_window_extent()
    for one, other in itertools.combinations([*boxes, legend], 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.y0 >= axis.get_window_extent().y1
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_points_and_axes(drawn):
    """Every strategy is a point, joined to its own name; small differences look small."""
    table, _, axis = drawn
    places = {e["strategy"]: (e["tokens_per_forward"], 100 * e["accuracy"]) for e in table}
    markers = [line for line in axis.lines if line.get_marker() in ("s", "o", "D", "*")]
    points = [point for line in markers for point in zip(*line.get_data())]
    assert sorted(points) == sorted(places.values())
    ends = {text.get_position()[0]: text.xy for text in axis.texts if not text.get_text()}
    assert len(ends) == len(table)
    for name in (text for text in axis.texts if text.get_text()):
        assert ends[name.get_position()[0]] == places[name.get_text()]
    low, high = axis.get_ylim()
    assert low == 0 or 0 < low <= high - 20
    for e in table:
        assert low <= 100 * (e["accuracy"] - e["stderr"])
        assert high >= 100 * (e["accuracy"] + e["stderr"])


@pytest.mark.parametrize("accuracies, questions", [
    ((0.95, 0.41), 100), ((0.99, 0.98), 1000), ((0.0, 0.0), 10),
    ((1.0, 1.0), 1), ((1.0, 0.0), 1)])                          # of one there is no standard error
def test_what_the_axis_shows(accuracies, questions):
    """All points, however far apart or near the ends."""
    table = [{"strategy": name, "tokens_per_forward": k, "accuracy": accuracy,
              "stderr": 0.01 if questions > 1 else float("nan"), "questions": questions}
             for name, k, accuracy in zip(("k = 1", "static 2"), (1.0, 2.0), accuracies)]
    figure = pareto_plot(table, "title")
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    assert 0 <= low <= 100 * min(accuracies) and 100 * max(accuracies) < high <= 105
    plt.close(figure)
