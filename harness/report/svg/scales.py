"""Axes: map a value to a coordinate, and choose round numbers for ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

WIDE = 10.0
"""An axis is logarithmic if its values are positive and the highest is more than WIDE times the lowest."""


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis. It maps values from `low` to `high` to coordinates from `start` to `end`."""

    name: str
    """Name of the quantity, with its unit."""
    write: Callable[[float], str]
    """Function that formats the value of a tick."""
    log: bool = False
    """True for a logarithmic axis."""
    own_ticks: tuple[float, ...] = ()
    """Values to name instead of round numbers. A value too near to the one before it gets no name."""
    low: float = 0.0
    """Lowest value."""
    high: float = 1.0
    """Highest value."""
    start: float = 0.0
    """Coordinate of `low`."""
    end: float = 1.0
    """Coordinate of `high`."""

    @classmethod
    def suited(
        cls, name: str, write: Callable[[float], str], values: Sequence[float], own_ticks: tuple[float, ...] = ()
    ) -> Axis:
        """Return an axis for `values`, which is logarithmic, and is named so, if the values range wide; see `WIDE`."""
        log = 0 < min(values) < max(values) / WIDE
        return cls(f"{name} (logarithmic)" if log else name, write, log, own_ticks)

    def over(self, values: Sequence[float], start: float, end: float, pad: float = 0.06) -> Axis:
        """Return this axis with a range that shows all `values`, with some padding. A logarithm needs positive values."""
        low, high = self._f(min(values)), self._f(max(values))
        air = (high - low) * pad or (0.3 if self.log else abs(high) * 0.1 or 1.0)
        ends = (low - air, high + air)
        low, high = (10**value for value in ends) if self.log else ends
        return replace(self, low=low, high=high, start=start, end=end)

    def at(self, value: float) -> float:
        """Return the coordinate of `value`. A value outside the range gets the coordinate of the nearer end."""
        share = (self._f(value) - self._f(self.low)) / (self._f(self.high) - self._f(self.low))
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 2)

    def _f(self, value: float) -> float:
        return math.log10(max(value, 5e-324)) if self.log else value

    def ticks(self, about: int = 6) -> list[float]:
        """Return round values inside the range, roughly `about` of them; or the axis's own ticks that have room."""
        if self.own_ticks:
            found: list[float] = []
            for value in sorted(self.own_ticks):
                if not found or abs(self.at(value) - self.at(found[-1])) >= 30:
                    found.append(value)
            return found
        if not self.log:
            step = _round_step((self.high - self.low) / about)
            lowest, highest = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [round(i * step, 12) for i in range(lowest, highest + 1)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = max(1, math.ceil((last - first) / about))
        digits = (1.0,) if last - first > 3 else (1.0, 2.0, 5.0)
        values = [float(f"{d * 10.0**e:.6g}") for e in range(first, last + 1, every) for d in digits]
        return [v for v in values if self.low <= v <= self.high]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
