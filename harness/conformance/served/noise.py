"""Errors of log-probabilities, and how large they may be. The module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.conformance.tolerance_constants import (
    CARRIED_FACTOR,
    EPSILON,
    FEW_NUMBERS,
    LARGEST_EPS,
    LARGEST_FACTOR,
    NOISE_FACTOR,
    NOISE_FLOOR_EPS,
)

NARROWEST_NOISE_FIRST = ("float32", "float16", "bfloat16")
"""Dtypes in which servers compute, the one with the smallest rounding errors first."""


@dataclass(frozen=True)
class Errors:
    """Sizes of the errors of the log-probabilities in several answers, in nats."""

    rms: float
    """Root mean square of all errors."""
    row_rms: float
    """Root mean square of the errors in one answer, the largest over all answers."""
    largest: float
    """The largest absolute error."""

    def at_most(self, other: Errors) -> bool:
        """Return whether each of the three numbers is at most as large as in `other`."""
        return self.rms <= other.rms and self.row_rms <= other.row_rms and self.largest <= other.largest

    def share_of(self, other: Errors) -> float:
        """Return the largest of the ratios of the three numbers to those in `other`."""
        return max(self.rms / other.rms, self.row_rms / other.row_rms, self.largest / other.largest)


def errors(rows: Sequence[Sequence[float]]) -> Errors:
    """Return the Errors of answers. rows: absolute errors of the log-probabilities, one list per answer."""
    return Errors(rms([one for row in rows for one in row]), max(map(rms, rows)), max(map(max, rows)))


def allowed(own: Errors, measured: Errors | None, want: Sequence[Sequence[float]], dtype: str) -> Errors:
    """Return the largest errors that a right server may have.

    own: errors of the reference in `dtype`. measured: errors of the server's answers for the base model, or None if
    these are wrong. want: the reference's log-probabilities in float64, one list per answer. The rule is that of
    `carried_noise`, applied to the larger of CARRIED_FACTOR times `own` and NOISE_FACTOR times `measured`.
    """
    numbers = [one for row in want for one in row]
    floor = NOISE_FLOOR_EPS[dtype] * EPSILON[dtype] * rms(numbers)
    few = 1 + FEW_NUMBERS / min(map(len, want))
    base = measured or Errors(0.0, 0.0, 0.0)

    def wide(own_error: float, measured_error: float) -> float:
        return max(CARRIED_FACTOR * own_error, NOISE_FACTOR * measured_error)

    return Errors(
        rms=wide(own.rms, base.rms) * (1 + FEW_NUMBERS / len(numbers)) + floor,
        row_rms=wide(own.row_rms, base.row_rms) * few + floor,
        largest=LARGEST_FACTOR * (wide(own.largest, base.largest) + LARGEST_EPS * floor),
    )


def smallest_noticed(effect: Errors, factor: float, limit: Errors) -> float:
    """Return the smallest relative error of the scaling that exceeds a limit; infinite if a wrong scaling has no effect.

    effect: errors that result if the scaling is wrong by `factor`. They are assumed to be proportional to `factor`.
    """
    share = effect.share_of(limit)
    return factor / share if share else math.inf


def rms(numbers: Sequence[float]) -> float:
    """Return the root mean square of `numbers`."""
    return math.sqrt(sum(one * one for one in numbers) / len(numbers))
