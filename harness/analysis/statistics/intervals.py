"""Intervals, tests and percentiles from counts and ranks: Wilson, order statistics, exact McNemar, Holm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate, count
from statistics import NormalDist, median

LEVEL = 0.95
POWER = 0.8
SHARES = (0.50, 0.95, 0.99)
"""Percentiles that reports show, as shares of the samples."""


def wilson(correct: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion. For n = 0, it is (0, 1).

    Raises ValueError unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


@dataclass(frozen=True)
class Median:
    """A median, with its interval from order statistics. `low` and `high` are None if there are too few samples."""

    value: float
    low: float | None
    high: float | None
    count: int


def _half_cumulative(n: int) -> Iterator[tuple[int, int]]:
    """Yield (i, C(n, 0) + ... + C(n, i)) for i = 0 to n, as exact integers. C is the binomial coefficient.

    The sum divided by 2**n is P(Binomial(n, 1/2) <= i).
    """
    term, total = 1, 1
    for i in range(n + 1):
        yield i, total
        term = term * (n - i) // (i + 1)
        total += term


@cache  # a report asks for the same few numbers of samples thousands of times
def _rank(n: int, level: float) -> int:
    """Return the index of the lower end of the median's interval among n sorted samples, or -1 if there is none."""
    numerator, denominator = (1 - level).as_integer_ratio()  # exact: 2**n overflows a float beyond n = 1023
    rank = -1
    for i, cumulative in _half_cumulative(n):
        if 2 * cumulative * denominator > numerator << n:
            break
        rank = i
    return rank


def median_interval(samples: Sequence[float], level: float = LEVEL) -> Median:
    """Return the median of the samples and its interval at `level`. Raises ValueError without samples.

    The ends of the interval are two samples at the same distance from either end of the sorted list, as close together
    as `level` allows. The level holds for independent samples of any distribution. Steps of one process are not
    independent of each other, so their interval does not hold for another process.
    """
    if not samples:
        raise ValueError("no samples")
    ordered, n = sorted(samples), len(samples)
    rank = _rank(n, level)
    if rank < 0:
        return Median(median(ordered), None, None, n)
    return Median(median(ordered), ordered[rank], ordered[n - 1 - rank], n)


@cache
def fewest_with_interval() -> int:
    """Return the smallest number of samples whose median has an interval at `LEVEL`."""
    return next(n for n in count(1) if _rank(n, LEVEL) >= 0)


def mcnemar(only_left: int, only_right: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    only_left, only_right: number of items that only the left, or only the right side answered correctly.
    """
    n, fewer = only_left + only_right, min(only_left, only_right)
    below = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * below / 2**n) if n else 1.0


def paired_difference(
    both: int, only_left: int, only_right: int, neither: int, level: float = LEVEL
) -> tuple[float, float]:
    """Return the interval of left - right, for two shares of the same items (Newcombe 1998, paired, method 10).

    The arguments count the items that both sides, only one side, or neither side answered correctly. The interval
    combines two Wilson intervals with the correlation of the answers, so it is valid for few items too. Its width is
    above 0 even if all answers are equal.
    """
    n = both + only_left + only_right + neither
    left, right = both + only_left, both + only_right
    (a_low, a_high), (b_low, b_high) = wilson(left, n, level), wilson(right, n, level)
    if n == 0:
        return -1.0, 1.0
    a, b = left / n, right / n
    covariance = both * neither - only_left * only_right
    scale = math.sqrt(left * right * (n - left) * (n - right))
    correlation = (max(covariance - n / 2, 0.0) if covariance > 0 else covariance) / scale if scale else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y))

    return a - b - reach(a - a_low, b_high - b), a - b + reach(a_high - a, b - b_low)


def holm(p_values: Mapping[str, float], tests: int = 0) -> dict[str, float]:
    """Return p values adjusted for several tests (Holm's step-down), by name.

    tests: number of all tests, if `p_values` holds only the smallest p values of them.
    """
    tests = max(tests, len(p_values))
    ordered = sorted(p_values.items(), key=lambda pair: pair[1])
    adjusted = (min(1.0, (tests - place) * p) for place, (_, p) in enumerate(ordered))
    return dict(zip((name for name, _ in ordered), accumulate(adjusted, max), strict=True))


def detectable(n: int, disagreement: float) -> float:
    """Return the smallest true difference of two accuracies that a two-sided test at 5 % finds with 80 % power.

    n: number of items. disagreement: share of items that exactly one side answers correctly. If both sides have the
    accuracy p and independent answers, the disagreement is 2 p (1 - p).
    """
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2) + NormalDist().inv_cdf(POWER)
    return z * math.sqrt(disagreement / n)


@cache
def samples_needed(share: float) -> int:
    """Return the fewest samples for the percentile `share`: enough for one sample beyond it, e.g. 0.95 -> 20."""
    return math.ceil(1 / (1 - Fraction(str(share))))


def percentile(samples: Sequence[float], share: float) -> float | None:
    """Return the smallest sample that is at least as large as `share` (e.g. 0.95) of all samples.

    If there are too few samples, return None.
    """
    if len(samples) < samples_needed(share):
        return None
    return sorted(samples)[math.ceil(Fraction(str(share)) * len(samples)) - 1]
