"""Measures: a count as people say it, in fewer digits than are printed or in a unit of their own. No torch."""

from __future__ import annotations

from harness.claims.measure import MeasureResult, Quantity, measure
from harness.claims.measures.arithmetic import written


@measure("count")
def whole_multiple(of: Quantity, to: Quantity, cut: bool = False) -> MeasureResult:
    """`of` as the nearest whole multiple of `to`, or cut to one: what stands behind `125.0M`, said of a `125M` model."""
    number = int(of // to) if cut else round(of / to)
    return MeasureResult(number * to, f"{written(of)} as {number:,} x {written(to)}")


@measure("count")
def in_binary_millions(of: Quantity) -> MeasureResult:
    """A count for a table whose M is 2^20: so many of these, as millions."""
    return MeasureResult(of * 10**6 / 2**20, f"{written(of)} / 2^20, in millions")


@measure("bytes")
def in_gigabytes_of_1024_million(of: Quantity) -> MeasureResult:
    """Bytes for a table whose G is 1,024 x 10^6 of them, binary in one step and decimal in two: so many of these, as GB."""
    return MeasureResult(of * 1000 / 1024, f"{written(of)} B / (1,024 x 10^6), in GB")
