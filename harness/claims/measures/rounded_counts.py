"""Measures: counts in fewer digits than printed, or in unusual units. No torch."""

from __future__ import annotations

from harness.claims.measure import MeasureResult, Quantity, measure
from harness.claims.measures.arithmetic import written


@measure("count")
def whole_multiple(of: Quantity, to: Quantity, cut: bool = False) -> MeasureResult:
    """`of` rounded (or cut) to a whole multiple of `to`, e.g. `125.0M` for a `125M` model."""
    number = int(of // to) if cut else round(of / to)
    return MeasureResult(number * to, f"{written(of)} as {number:,} x {written(to)}")


@measure("count")
def in_binary_millions(of: Quantity) -> MeasureResult:
    """A count in units of 2^20, as millions: for a table with M = 2^20."""
    return MeasureResult(of * 10**6 / 2**20, f"{written(of)} / 2^20, in millions")


@measure("bytes")
def in_gigabytes_of_1024_million(of: Quantity) -> MeasureResult:
    """Bytes in units of 1,024 x 10^6, as GB: for a table with such a G, binary in one step and decimal in two."""
    return MeasureResult(of * 1000 / 1024, f"{written(of)} B / (1,024 x 10^6), in GB")
