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
)  # fmt: skip


@dataclass(frozen=True)
class Errors:
    """Size of the differences between two lists of log-probabilities, in nats."""

    rms: float
    """Root mean square of all differences."""
    row_rms: float
    """The largest root mean square of the differences of one request."""
    largest: float
    """The largest difference."""

    def at_most(self, other: Errors) -> bool:
        """Return whether no error is larger than in `other`. NaN is larger than any number."""
        return all(getattr(self, one) <= getattr(other, one) for one in ("rms", "row_rms", "largest"))


def errors(have: Sequence[Sequence[float]], want: Sequence[Sequence[float]]) -> Errors:
    """Return the errors of `have`, one list of log-probabilities per request."""
    rows = [[abs(a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(have, want, strict=True)]
    rows = [[math.inf if math.isnan(one) else one for one in row] for row in rows]
    return Errors(_rms([one for row in rows for one in row]), max(map(_rms, rows)), max(map(max, rows)))


def allowed(own: Errors, measured: Errors | None, want: Sequence[Sequence[float]], dtype: str) -> Errors:
    """Return the largest errors that a right server may have.

    own: errors of the reference in `dtype`. measured: errors of the server's base rows, if they are known to be right.
    want: the reference's log-probabilities in float64. The factors are those of `carried_noise`; what the server itself
    measured counts with NOISE_FACTOR.
    """
    numbers = [one for row in want for one in row]
    floor = NOISE_FLOOR_EPS[dtype] * EPSILON[dtype] * _rms(numbers)
    few = 1 + FEW_NUMBERS / min(map(len, want))

    def wide(own_error: float, measured_error: float) -> float:
        return max(CARRIED_FACTOR * own_error, NOISE_FACTOR * measured_error)

    base = measured or Errors(0.0, 0.0, 0.0)

    return Errors(
        wide(own.rms, base.rms) * (1 + FEW_NUMBERS / len(numbers)) + floor,
        wide(own.row_rms, base.row_rms) * few + floor,
        LARGEST_FACTOR * (wide(own.largest, base.largest) + LARGEST_EPS * floor),
    )


def smallest_noticed(effect: Errors, factor: float, limit: Errors) -> float:
    """Return the smallest relative error of the scaling that exceeds a limit.

    effect: errors that a scaling causes which is wrong by `factor`. Smaller errors are taken as proportional.
    """
    ratios = [getattr(effect, one) / max(getattr(limit, one), 1e-300) for one in ("rms", "row_rms", "largest")]
    return factor / max(ratios) if max(ratios) > 0 else math.inf


def _rms(numbers: Sequence[float]) -> float:
    return math.sqrt(sum(one * one for one in numbers) / len(numbers))
