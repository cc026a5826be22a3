"""Measures: figures that a paper prints twice, or as a mean of other figures. No torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from harness.claims.measure import MeasureResult, Quantity, measure
from harness.claims.measures.arithmetic import written


@measure("number")
def printed_elsewhere(figure: Quantity, place: str) -> MeasureResult:
    """The figure that the paper prints for the same quantity in another place."""
    return MeasureResult(figure, f"{written(figure)} in {place}")


@measure("number")
def mean_score(of: list[Any], last: Quantity) -> MeasureResult:
    """The mean of printed scores; a list among them, e.g. accuracy and F1 of one task, counts as its own mean.

    last: a unit in the last digit of the scores, 0.1 or 0.01.
    """
    scores = [_mean(one) if isinstance(one, list) else Fraction(str(one)) for one in of]
    shown = " + ".join(f"{float(one):g}" for one in scores)
    found = _mean(scores)
    return MeasureResult(found, f"({shown}) / {len(scores)}", within=(found - last / 2, found + last / 2))


def _mean(scores: list[Any]) -> Fraction:
    return sum((Fraction(str(one)) for one in scores), Fraction(0)) / len(scores)
