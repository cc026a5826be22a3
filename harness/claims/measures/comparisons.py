"""Measures: comparisons of printed numbers or results of other measures. Imports no torch."""

from __future__ import annotations

from itertools import pairwise

from harness.claims.measure import MeasureResult, Quantities, Quantity, measure
from harness.claims.measures.arithmetic import written


@measure("count")
def wins(of: Quantities, over: Quantities) -> MeasureResult:
    """Number of positions in two lists at which `of` is larger than `over`.

    Raises ValueError for lists of different lengths.
    """
    if len(of) != len(over):
        raise ValueError(f"`of` has {len(of)} numbers and `over` has {len(over)}; write lists of equal length")
    pairs = list(zip(of, over, strict=True))
    not_larger = [f"{written(one)} <= {written(other)}" for one, other in pairs if one <= other]
    count = len(pairs) - len(not_larger)
    return MeasureResult(count, "; ".join([*not_larger, f"{count} of {len(pairs)} are larger"]))


@measure("property")
def increasing(of: Quantities) -> MeasureResult:
    """Check whether each number of a list is larger than the previous one."""
    return MeasureResult(all(one < after for one, after in pairwise(of)), ", ".join(map(written, of)))


@measure("property")
def falls_by(of: Quantity, to: Quantity, share: Quantity) -> MeasureResult:
    """Check whether 1 - `to` / `of` is exactly `share`, e.g. 2/3."""
    less = 1 - to / of
    shown = less if less.denominator < 100 else float(less)
    return MeasureResult(less == share, f"1 - {written(to)} / {written(of)} = {shown}")


@measure("number")
def printed_elsewhere(figure: Quantity, place: str) -> MeasureResult:
    """The figure that the paper prints for the same quantity in another section or table. place: this section or table."""
    return MeasureResult(figure, f"{written(figure)} in {place}")
