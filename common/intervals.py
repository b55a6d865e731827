"""
How sure is a difference that a few trainings show on the same questions? Student's t, without
scipy.

    from common.intervals import paired_over_seeds, t_quantile
    mean, half = paired_over_seeds([[0, 1, 0], [1, 1, 0]])      # two seeds, three questions
    t_quantile(0.95, df=4)                                      # 2.776
"""
import math
import statistics


def t_probability(angle, df):
    """P(|t| < sqrt(df) * tan(angle)) for Student's t with `df` degrees of freedom, an int.

    The finite sums of Abramowitz and Stegun, 26.7.3 (odd df) and 26.7.4 (even df).
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2 == 0:
        # sin (1 + 1/2 cos^2 + (1 * 3)/(2 * 4) cos^4 + ...), the last power is df - 2
        term = total = sine
        for n in range(2, df, 2):
            term *= (n - 1) / n * cosine ** 2
            total += term
        return total
    # 2/pi (angle + sin (cos + 2/3 cos^3 + (2 * 4)/(3 * 5) cos^5 + ...)), the last power is df - 2
    total, term = angle, sine * cosine
    for n in range(1, df, 2):
        total += term
        term *= (n + 1) / (n + 2) * cosine ** 2
    return 2 / math.pi * total


def t_quantile(level, df):
    """|t| with `df` degrees of freedom, an int above 0, stays below this with probability `level`:
    half an interval's width, in standard errors."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):                                     # bisection: each halves the doubt
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


def half_width(values, level):
    """Half the t interval for the mean of independent values; infinite for a single one."""
    if len(values) < 2:
        return math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return t_quantile(level, len(values) - 1) * error


def paired_over_seeds(differences, level=0.95):
    """(mean difference, half of its interval at `level`).

    differences   a list for each seed: variant - default of that seed, for each question, the same
                  questions in all lists. One seed has no interval: half of it is infinite

    Two draws are behind the mean, of trainings and of questions, and the claim is about others of
    both. Each has its ordinary t interval, over the seeds' means (df: seeds - 1) and over the
    questions' means (df: questions - 1), and their halves add as independent errors do: h^2 = a^2 +
    b^2. That covers at least at `level`, whatever the shares of the two (Banerjee 1960, Sankhya 22)
    and with a handful of seeds; either alone misses the other's draw.
    """
    by_seed = [statistics.fmean(own) for own in differences]
    by_question = [statistics.fmean(own) for own in zip(*differences, strict=True)]
    half = math.hypot(half_width(by_seed, level), half_width(by_question, level))
    return statistics.fmean(by_seed), half
