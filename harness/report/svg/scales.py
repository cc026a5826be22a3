"""Axes: map a value to a coordinate, and choose round numbers for ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

WIDE = 10.0
"""By default, an axis is logarithmic if its values are positive and the highest is more than WIDE times the lowest."""


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis, which maps values to coordinates."""

    name: str
    """Name of the quantity, with its unit."""
    write: Callable[[float], str]
    """Function that formats the value of a tick."""
    log: bool | None = None
    """True for a logarithmic axis. If None, the method `over` decides from the values."""
    each: bool = False
    """True to put ticks at the values themselves instead of at round numbers, where their labels have room."""
    whole: bool = False
    """True for a linear axis of counts. Its ticks are whole numbers between the lowest and the highest value."""
    values: tuple[float, ...] = ()
    """Values that were given to `over`, lowest first."""
    span: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)
    """(lowest value, highest value, coordinate of the lowest, coordinate of the highest)."""

    def over(self, values: Sequence[float], start: float, end: float, pad: float = 0.06) -> Axis:
        """Return a copy of this axis with a range that shows all `values`, with some space at both ends.

        If the axis is logarithmic, its name says so. start, end: coordinates of the ends.
        """
        low, high = min(values), max(values)
        log = 0 < low < high / WIDE if self.log is None else self.log
        low, high = (math.log10(v) if log else v for v in (low, high))
        air = (high - low) * pad if high > low else 0.3 if log else abs(high) * 0.1 or 1.0
        low, high = (10**v if log else v for v in (low - air, high + air))
        name = f"{self.name} (logarithmic)" if log else self.name
        return replace(self, name=name, log=log, values=tuple(sorted(set(values))), span=(low, high, start, end))

    def at(self, value: float) -> float:
        """Return the coordinate of `value`. A value outside the range gets the coordinate of the nearer end."""
        low, high, start, end = self.span
        share = (self._f(value) - self._f(low)) / (self._f(high) - self._f(low))
        return round(start + min(1.0, max(0.0, share)) * (end - start), 2)

    def _f(self, value: float) -> float:
        return math.log10(max(value, 5e-324)) if self.log else value

    def ticks(self, about: int = 6) -> list[float]:
        """Return about `about` round values in the range. If `each` is true, return `values` whose labels have room."""
        low, high, *_ = self.span
        if self.each:
            found: list[float] = []
            for value in self.values:
                if not found or abs(self.at(value) - self.at(found[-1])) >= 30:
                    found.append(value)
            return found
        if not self.log:
            step = _round_step((high - low) / about)
            if self.whole:
                low, high, step = self.values[0], self.values[-1], max(1.0, 2 * step if step % 1 else step)
            lowest, highest = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            return [round(i * step, 12) for i in range(lowest, highest + 1)]
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((last - first) / about))
        digits = (1.0,) if last - first > 3 else (1.0, 2.0, 5.0)
        values = [float(f"{d * 10.0**e:.6g}") for e in range(first, last + 1, every) for d in digits]
        return [v for v in values if low <= v <= high]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
