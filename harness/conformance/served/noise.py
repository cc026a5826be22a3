"""Errors of log-probabilities, and how large they may be. Imports no torch."""

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
    """Largest root mean square of the errors of a single answer."""
    largest: float
    """The largest absolute error."""

    def at_most(self, other: Errors) -> bool:
        """Return whether `rms`, `row_rms` and `largest` are each at most as large as in `other`."""
        return self.rms <= other.rms and self.row_rms <= other.row_rms and self.largest <= other.largest

    def share_of(self, other: Errors) -> float:
        """Divide `rms`, `row_rms` and `largest` by their values in `other`, and return the largest of the three ratios."""
        return max(self.rms / other.rms, self.row_rms / other.row_rms, self.largest / other.largest)


def errors(rows: Sequence[Sequence[float]]) -> Errors:
    """Return the Errors of answers. rows: absolute errors of the log-probabilities, one list per answer."""
    return Errors(rms([one for row in rows for one in row]), max(map(rms, rows)), max(map(max, rows)))


def allowed(own: Errors, measured: Errors | None, want: Sequence[Sequence[float]], dtype: str) -> Errors:
    """Return the largest errors that a right server may have, by the rule of `tolerance_policies.carried_noise`.

    own: errors of the reference in `dtype`. measured: errors of the server's answers for the base model, or None if
    these answers are wrong. want: the reference's log-probabilities in float64, one list per answer. As the noise,
    the rule takes CARRIED_FACTOR times `own` or NOISE_FACTOR times `measured`, whichever is larger.
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
    """Return the smallest relative error of the scaling that causes errors above `limit`, or infinity if none does.

    effect: errors caused by a scaling whose relative error is `factor`. Errors are assumed to be proportional to it.
    """
    share = effect.share_of(limit)
    return factor / share if share else math.inf


def rms(numbers: Sequence[float]) -> float:
    """Return the root mean square of `numbers`."""
    return math.sqrt(sum(one * one for one in numbers) / len(numbers))
