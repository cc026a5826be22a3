"""Measures: counts as some papers print them, i.e. rounded twice or in unusual units. Imports no torch."""

from __future__ import annotations

from harness.claims.measure import MeasureResult, Quantity, measure
from harness.claims.measures.arithmetic import written


@measure("count")
def whole_multiple(of: Quantity, to: Quantity, cut: bool = False) -> MeasureResult:
    """The number `of`, rounded to a whole multiple of the number `to`. cut: round down instead.

    A paper may round a size to `125M` first, and then print it as `125.0M`.
    """
    number = int(of // to) if cut else round(of / to)
    return MeasureResult(number * to, f"{written(of)} as {number:,} x {written(to)}")


@measure("count", is_unit=True)
def in_binary_millions(of: Quantity) -> MeasureResult:
    """A count, divided by 2^20 and written as if it had been divided by one million.

    Some tables print counts in this way.
    """
    return MeasureResult(of * 10**6 / 2**20, f"{written(of)} / 2^20, in millions")


@measure("bytes", is_unit=True)
def in_gigabytes_of_1024_million(of: Quantity) -> MeasureResult:
    """Bytes, divided by 1,024 x 10^6 and written as if they had been divided by 10^9.

    Some tables print such sizes: they divide by 1,000 twice and by 1,024 once.
    """
    return MeasureResult(of * 1000 / 1024, f"{written(of)} B / (1,024 x 10^6), in GB")
