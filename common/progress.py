"""
A bar for long work whose estimate can be believed.

    with Progress(total=700, unit="step") as bar:
        for step in range(700):
            with bar.aside(every=100):
                evaluate()                      # now and then, beside the work itself
            work()
            bar.update()
            bar.lap(left=700 - step - 1)
            bar.say("loss 0.31")                # 84/700 [00:41, 5 min left, loss 0.31]

tqdm extrapolates from the first steps, which are the slowest: torch is only warming up. Here the
time left is the median of the last laps times those that are left, and the first lap does not
count. Work that is done now and then (`aside`) is added as often as it is still to come.
"""
import math
import statistics
import time
from contextlib import contextmanager

from tqdm import tqdm

WARM, RECENT = 4, 50                    # laps before there is an estimate; laps that it looks at


def in_words(seconds):
    """A time for people: "40 s", "6 min", "2.5 h"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Progress(tqdm):
    """tqdm, with an estimate of its own; the arguments are tqdm's."""

    def __init__(self, **settings):
        shape = "{percentage:3.0f}% {bar:8} {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        super().__init__(bar_format=shape, dynamic_ncols=True, **settings)
        self.laps, self.since, self.estimate = [], time.perf_counter(), ""
        self.aside_seconds, self.aside_every, self.since_aside = 0.0, math.inf, 0

    def lap(self, left, counts=True):
        """A lap is done, `left` are to come. counts   False: an earlier run had done it already"""
        now = time.perf_counter()
        if counts:
            self.laps.append(now - self.since)
            self.since_aside += 1
        self.since = now
        if len(self.laps) >= WARM and left:
            pace = statistics.median(self.laps[1:][-RECENT:])
            asides = (self.since_aside + left) // self.aside_every
            seconds = left * pace + asides * self.aside_seconds
            self.estimate = f"{in_words(seconds)} left, "
        elif not left:
            self.estimate = ""

    @contextmanager
    def aside(self, every):
        """What happens inside is no part of a lap, and comes again after `every` laps."""
        began = time.perf_counter()
        yield
        self.aside_seconds, self.aside_every = time.perf_counter() - began, every
        self.since += self.aside_seconds
        self.since_aside = 0

    def say(self, text):
        """What else the bar shows."""
        self.set_postfix_str(self.estimate + text)
