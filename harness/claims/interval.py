"""Numbers with an interval around them, such as repeated measurements and rounded figures. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from harness.claims.measure import MeasureResult, Number


@dataclass(frozen=True)
class Interval:
    """A number, and the least and the largest value that it may have. For an exact number, all three are equal."""

    value: Fraction
    least: Fraction
    most: Fraction

    @classmethod
    def around(cls, value: Number, least: Number, most: Number) -> Interval:
        """Return the interval with these three numbers, as exact fractions."""
        return cls(Fraction(value), Fraction(least), Fraction(most))

    @classmethod
    def printed(cls, value: Number, last: Number) -> Interval:
        """Return the interval of all numbers that round to the printed figure `value`.

        last: one unit of the figure's last digit, e.g. 0.1 for 2.5; 0 if the figure is exact.
        """
        exact, half = Fraction(value), Fraction(last) / 2
        return cls(exact, exact - half, exact + half)

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.value + other.value, self.least + other.least, self.most + other.most)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.value - other.value, self.least - other.most, self.most - other.least)

    def __truediv__(self, other: Interval) -> Interval:
        """Return the quotient. `other` must be an interval of positive numbers."""
        return Interval(self.value / other.value, self.least / other.most, self.most / other.least)

    def from_printed(self, how: str) -> MeasureResult:
        """Return a MeasureResult for an interval from printed figures: its value, and both bounds as `within`.

        If the bounds are equal, `within` is None. how: the arithmetic as text.
        """
        return MeasureResult(self.value, how, within=None if self.least == self.most else (self.least, self.most))

    def measured(self, how: str) -> MeasureResult:
        """Return a MeasureResult for an interval from measurements: its `least` as the value, and `most`.

        If both are equal, `most` is None. how: the arithmetic as text.
        """
        return MeasureResult(self.least, how, most=None if self.least == self.most else self.most)


ZERO, ONE = Interval.around(0, 0, 0), Interval.around(1, 1, 1)
