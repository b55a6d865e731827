"""
common/progress.py against a clock that goes as fast as a test wants: when there is an estimate, and
what it is.
"""
import io
from types import SimpleNamespace

import pytest

from common import progress
from common.progress import Progress, in_words


@pytest.fixture
def clock(monkeypatch):
    """Seconds go by where a test says so: clock.now += 3."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def run(clock, seconds, total, bar=None):
    """A bar after laps of so many `seconds`."""
    bar = bar or Progress(total=total, disable=True)
    for second in seconds:
        clock.now += second
        bar.lap(left=total - len(bar.laps) - 1)
    return bar


@pytest.mark.parametrize("seconds, words", [
    (0.2, "1 s"), (39.5, "40 s"), (40, "40 s"), (89, "89 s"), (100, "2 min"), (6 * 60, "6 min"),
    (89 * 60, "89 min"), (90 * 60, "1.5 h"), (10 * 3600, "10.0 h")])
def test_in_words(seconds, words):
    assert in_words(seconds) == words


def test_no_estimate_before_four_laps(clock):
    """Nor when all is done."""
    bar = Progress(total=10, disable=True)
    estimates = [run(clock, [3], 10, bar).estimate for _ in range(10)]
    assert estimates[:3] == [""] * 3 and estimates[-1] == ""
    assert estimates[3:-1] == [f"{3 * left} s left, " for left in (6, 5, 4, 3, 2, 1)]


def test_first_lap_does_not_count(clock):
    """Of four laps the median is the last three's: with a fourth, slow one it would be 3."""
    assert run(clock, [100, 2, 2, 4], 10).estimate == "12 s left, "


def test_a_slow_lap_now_and_then_changes_nothing(clock):
    """The mean would say ten minutes."""
    assert run(clock, [1, 1, 1, 1, 500, 1, 1, 1], 18).estimate == "10 s left, "


def test_the_last_fifty_laps_count(clock):
    """A machine that becomes slower, for good."""
    bar = run(clock, [1] * 100, 200)
    assert bar.estimate == "2 min left, "
    assert run(clock, [4] * 24, 200, bar).estimate == "76 s left, "       # 24 of 50 laps
    assert run(clock, [4] * 2, 200, bar).estimate == "5 min left, "       # 26 of 50


def test_work_aside(clock):
    """An evaluation of 30 s before laps 0, 10 and 20 of 25: it is part of no lap, and is added as
    often as it is to come."""
    bar, estimates = Progress(total=25, disable=True), {}
    for lap in range(25):
        if lap % 10 == 0:
            with bar.aside(every=10):
                clock.now += 30
        estimates[lap + 1] = run(clock, [2], 25, bar).estimate
    assert bar.laps == [2] * 25
    assert estimates[4] == f"{in_words(21 * 2 + 2 * 30)} left, "
    assert estimates[12] == "56 s left, "                         # 13 laps and an evaluation
    assert estimates[22] == "6 s left, "                          # three laps


def test_what_the_bar_shows(clock):
    """How far it is, how long it will take, what the numbers are."""
    out = io.StringIO()
    with Progress(total=100, unit="step", file=out) as bar:
        for done in range(1, 11):
            clock.now += 4
            bar.update()
            bar.lap(left=100 - done)
            bar.say("loss 0.31")
    shown = out.getvalue().split("\r")
    early, late = ([part for part in shown if f" {done}/100 " in part][-1] for done in (3, 10))
    assert early.rstrip().endswith(", loss 0.31]") and "left" not in early
    assert late.rstrip().endswith(", 6 min left, loss 0.31]")
