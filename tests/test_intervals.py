"""
common/intervals.py: Student's t against printed tables, intervals against sums by hand, and how
often they cover the truth in simulated studies.
"""
import math
import random
import statistics

import pytest

from common.intervals import half_width, paired_over_seeds, t_quantile


@pytest.mark.parametrize("df, level, expected", [               # two-sided; any table has them
    (1, 0.95, 12.7062), (1, 0.99, 63.6567), (2, 0.95, 4.3027), (2, 0.9, 2.9200), (3, 0.99, 5.8409),
    (4, 0.95, 2.7764), (4, 0.99, 4.6041), (5, 0.95, 2.5706), (9, 0.95, 2.2622), (10, 0.99, 3.1693),
    (30, 0.95, 2.0423), (100, 0.95, 1.9840), (120, 0.99, 2.6174), (1318, 0.95, 1.9618)])
def test_t_quantile(df, level, expected):
    assert t_quantile(level, df) == pytest.approx(expected, abs=6e-5)


def test_t_quantile_in_closed_form():
    """One degree of freedom is Cauchy's distribution, two have an algebraic one; at any level."""
    for level in (0.5, 0.95, 1 - 0.05 / 16, 1 - 0.05 / 100):
        assert t_quantile(level, 1) == pytest.approx(math.tan(math.pi / 2 * level))
        assert t_quantile(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level ** 2)))


def test_an_interval_by_hand():
    """Two seeds, means 1 and 3; three questions, means 1, 2 and 3."""
    mean, half = paired_over_seeds([[0, 1, 2], [2, 3, 4]])
    assert mean == 2
    seeds, questions = 12.7062 * 1, 4.3027 * 1 / math.sqrt(3)   # stdev: sqrt(2) and 1
    assert half == pytest.approx(math.hypot(seeds, questions), rel=1e-5)
    assert half_width([1, 3], 0.95) == pytest.approx(seeds, rel=1e-5)


def test_few_of_something():
    assert paired_over_seeds([[1, 2]]) == (1.5, math.inf)       # one training tells of no other
    assert paired_over_seeds([[1], [3]]) == (2, math.inf)
    assert paired_over_seeds([[1, 1], [1, 1]]) == (1, 0)
    with pytest.raises(ValueError):
        paired_over_seeds([[1, 2], [3]])                        # not the same questions


def simulated(seeds, by_seed, by_question, rest, questions=60, studies=500):
    """Share of studies whose 95% interval holds the truth, 0; and that of an interval from the
    spread between seeds alone. The three noises are standard deviations."""
    rng, covered, alone = random.Random(0), 0, 0
    for _ in range(studies):
        shared = [rng.gauss(0, by_question) for _ in range(questions)]
        differences = []
        for _ in range(seeds):
            own = rng.gauss(0, by_seed)
            differences.append([own + base + rng.gauss(0, rest) for base in shared])
        mean, half = paired_over_seeds(differences)
        covered += abs(mean) <= half
        alone += abs(mean) <= half_width([statistics.fmean(own) for own in differences], 0.95)
    return covered / studies, alone / studies


@pytest.mark.parametrize("seeds", [2, 5])
def test_coverage(seeds):
    """At least about 95%, whichever noise is the larger one, and not 100% where one leads."""
    trainings = simulated(seeds, by_seed=1, by_question=0, rest=0.5)
    questions = simulated(seeds, by_seed=0, by_question=1, rest=0.1)
    both = simulated(seeds, by_seed=0.13 * math.sqrt(seeds), by_question=1, rest=0.1)
    for covered, _ in (trainings, questions, both):
        assert 0.93 <= covered <= 0.99
    assert trainings[1] > 0.93                                  # seeds alone would do here,
    assert questions[1] < 0.8                                   # but not here
