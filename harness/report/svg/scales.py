"""Axes: map a value to a coordinate, and choose round numbers for ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis. It maps values from `low` to `high` to coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the coordinate of `value`. A value outside the range gets the coordinate of the nearer end."""
        share = (self._f(value) - self._f(self.low)) / (self._f(self.high) - self._f(self.low))
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 2)

    def _f(self, value: float) -> float:
        return math.log10(max(value, 5e-324)) if self.log else value

    def ticks(self, about: int = 5) -> list[float]:
        """Return round values inside the range, roughly `about` of them."""
        if not self.log:
            step = _round_step((self.high - self.low) / about)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            return [round(i * step, 12) for i in range(first, last + 1)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = max(1, math.ceil((last - first) / about))
        digits = (1.0,) if last - first > 3 else (1.0, 2.0, 5.0)
        values = [float(f"{d * 10.0**e:.6g}") for e in range(first, last + 1, every) for d in digits]
        return [v for v in values if self.low <= v <= self.high]


def linear(values: list[float], start: float, end: float, pad: float = 0.06) -> Scale:
    """Return a linear scale that shows all `values`, with some padding."""
    low, high = min(values), max(values)
    air = (high - low) * pad or abs(high) * 0.1 or 1.0
    return Scale(low - air, high + air, start, end)


def logarithmic(values: list[float], start: float, end: float, pad: float = 0.06) -> Scale:
    """Return a logarithmic scale that shows all `values`. They must be positive."""
    low, high = math.log10(min(values)), math.log10(max(values))
    air = (high - low) * pad or 0.3
    return Scale(10 ** (low - air), 10 ** (high + air), start, end, log=True)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
