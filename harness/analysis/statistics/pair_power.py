"""Power of an A/B comparison: the smallest slow-down that its planned looks detect, given the spread of the pairs.

A look judges all pairs so far (see `pair_design`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.analysis.statistics.intervals import POWER
from harness.analysis.statistics.trimmed import cut

if TYPE_CHECKING:
    from harness.analysis.statistics.pair_design import Design

_HALVINGS = 50
FAR = 60
"""Upper end of the search for the smallest detectable slow-down, in standard errors. Such a slow-down is always
detected."""


def reach(scale: float, design: Design) -> float:
    """Return the smallest slow-down, as a log ratio, that a design detects with the probability POWER.

    scale: standard deviation of the log ratio of a pair.
    """
    low = math.log1p(design.slower_by)
    return least(lambda change: power(change, scale, design), low, low + FAR * scale / math.sqrt(design.first))


def least(found: Callable[[float], float], low: float, high: float) -> float:
    """Return the smallest change between `low` and `high` that is detected with the probability POWER.

    found: function that returns the probability that a change is detected. It must grow with the change.
    """
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= POWER else (middle, high)
    return high


def power(change: float, scale: float, design: Design) -> float:
    """Return the probability that a Cell is judged slower, if its true log ratio is `change` (noncentral t).

    The result is a product: the probability that the last planned look finds the change, times the probabilities that
    no earlier look judges the Cell unchanged. The product treats the looks as independent, so it is too low rather than
    too high. Almost all changes that an early look finds are found at the last look too.
    """
    last = design.fresh[-1]
    chance = _found(change - math.log1p(design.slower_by), scale, last, design.trim, design.levels[-1])
    for n in (design.first, *design.fresh[:-1]):
        suspected = _found(change - math.log1p(design.suspect_by), scale, n, design.trim, design.suspect)
        chance *= max(suspected, _too_wide(scale, n, design))
    return chance


def found(errors: float, df: float, level: float) -> float:
    """Return the probability that a one-sided t test at `level` finds an effect.

    errors: distance of the true effect from the margin of the test, in standard errors. df: degrees of freedom.
    """
    from scipy.special import nctdtr, stdtrit

    return 1.0 - float(nctdtr(df, errors, float(stdtrit(df, 1 - level))))


def _found(beyond: float, scale: float, n: int, share: float, level: float) -> float:
    return found(beyond * math.sqrt(n) / scale, _df(n, share), level)


def _too_wide(scale: float, n: int, design: Design) -> float:
    """Return the probability that the interval over `n` pairs is too wide to prove a Cell unchanged."""
    from scipy.special import chdtrc, stdtrit

    df = _df(n, design.trim)
    half = float(stdtrit(df, 0.5 + design.interval / 2)) * scale / math.sqrt(n)
    return float(chdtrc(df, df * (math.log1p(design.same_within) / half) ** 2))


def _df(n: int, share: float) -> int:
    return n - 2 * cut(n, share) - 1
