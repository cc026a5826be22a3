"""Measures: comparisons of printed numbers or results of other measures. No torch."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from harness.claims.measure import MeasureResult, Quantities, Quantity, measure
from harness.claims.measures.arithmetic import written


@measure("number")
def mean(of: Quantities, last: Quantity = Fraction(0)) -> MeasureResult:
    """The unweighted mean of numbers. last: for printed figures, a unit in the last digit of the coarsest one."""
    found = sum(of, Fraction(0)) / len(of)
    within = (found - last / 2, found + last / 2) if last else None
    return MeasureResult(found, f"({' + '.join(map(written, of))}) / {len(of)}", within=within)


@measure("count")
def wins(of: Quantities, over: Quantities) -> MeasureResult:
    """Number of positions at which `of` is larger than `over`.

    Raises ValueError for lists of different lengths.
    """
    if len(of) != len(over):
        raise ValueError(f"`of` has {len(of)} numbers and `over` {len(over)}; write as many in both")
    pairs = list(zip(of, over, strict=True))
    won = [f"{written(one)} > {written(other)}" for one, other in pairs if one > other]
    lost = [f"{written(one)} <= {written(other)}" for one, other in pairs if one <= other]
    return MeasureResult(len(won), "; ".join([*lost, f"{len(won)} of {len(pairs)} are larger"]))


@measure("property")
def increasing(of: Quantities) -> MeasureResult:
    """Check whether each number is larger than the previous one."""
    rises = all(one < after for one, after in pairwise(of))
    return MeasureResult(rises, ", ".join(map(written, of)))
