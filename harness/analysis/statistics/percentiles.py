"""Percentiles of raw samples, if at least one sample lies beyond the percentile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

SHARES = (0.50, 0.95, 0.99)


def needed(share: float) -> int:
    """Return the smallest number of samples for a percentile: at least one sample lies beyond it."""
    return math.ceil(1 / (1 - Fraction(str(share))))


def percentile(samples: Sequence[float], share: float) -> float | None:
    """Return the smallest sample that `share` of all do not exceed; None for fewer samples than `needed`."""
    if len(samples) < needed(share):
        return None
    return sorted(samples)[math.ceil(Fraction(str(share)) * len(samples)) - 1]
