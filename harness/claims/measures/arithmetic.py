"""Measures: arithmetic with printed numbers or results of other measures. Imports no torch.

The parameter `last` is one unit of the last digit of the least precise number among the arguments: 0.1 for 2.5 and
1.25. It is 0 if all arguments are exact. It sets the range of results that the rounding of the numbers allows.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from harness.claims.interval import ONE, ZERO, Interval
from harness.claims.measure import Count, Counts, MeasureResult, Quantities, Quantity, Sizes, measure


@measure("ratio")
def ratio(of: Quantity, to: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """The ratio `of` / `to`.

    last: one unit of the last digit of the less precise number; 0 if both are exact.
    """
    return quotient(of, to, last).from_printed(f"{written(of)} / {written(to)}")


@measure("share")
def share(of: Quantity, to: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """`of` as a share of `to`.

    last: one unit of the last digit of the less precise number; 0 if both are exact.
    """
    return ratio(of, to, last)


@measure("share")
def share_less(of: Quantity, than: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """Relative reduction: 1 - `of` / `than`.

    last: one unit of the last digit of the less precise number; 0 if both are exact.
    """
    return (ONE - quotient(of, than, last)).from_printed(f"1 - {written(of)} / {written(than)}")


@measure("share")
def share_more(of: Quantity, than: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """Relative increase: `of` / `than` - 1.

    last: one unit of the last digit of the less precise number; 0 if both are exact.
    """
    return (quotient(of, than, last) - ONE).from_printed(f"{written(of)} / {written(than)} - 1")


@measure("share")
def most_share_less(of: Quantities, than: Quantities, last: Quantity = Fraction(0)) -> MeasureResult:
    """Largest relative reduction: the largest of 1 - `of` / `than` over the positions of two lists.

    It fits a claim such as `up to 60 % less`. last: one unit of the last digit of the least precise number; 0 if all
    are exact. For sums of printed figures, it is this unit times the number of terms.
    """
    shares = [ONE - quotient(one, other, last) for one, other in zip(of, than, strict=True)]
    largest = Interval(*(max(getattr(one, end) for one in shares) for end in ("value", "least", "most")))
    return largest.from_printed(f"the largest of {', '.join(f'{float(100 * one.value):.4g}%' for one in shares)}")


@measure("count")
def count_sum(of: Counts) -> MeasureResult:
    """The sum of counts."""
    return MeasureResult(sum(of, Fraction(0)), " + ".join(map(written, of)))


@measure("count")
def count_product(of: Counts) -> MeasureResult:
    """The product of counts."""
    return MeasureResult(math.prod(of, start=Fraction(1)), " x ".join(map(written, of)))


@measure("bytes")
def bytes_sum(of: Sizes, last: Quantity = Fraction(0)) -> MeasureResult:
    """The sum of sizes in bytes.

    last: one unit of the last digit of the least precise number; 0 if all are exact.
    """
    found = sum((Interval.printed(one, last) for one in of), ZERO)
    return found.from_printed(" + ".join(f"{written(one)} B" for one in of))


@measure("bytes")
def bytes_of(count: Count, each: Quantity) -> MeasureResult:
    """Bytes that `count` numbers take. each: bytes per number, e.g. 2 for a number in 16 bits."""
    return MeasureResult(count * each, f"{written(count)} x {written(each)} B")


@measure("bytes")
def bytes_saved(of: Quantity, than: Quantity) -> MeasureResult:
    """Bytes by which `of` is less than `than`."""
    return MeasureResult(than - of, f"{written(than)} B - {written(of)} B")


@measure("number")
def difference(of: Quantity, less: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """The difference `of` - `less`.

    last: one unit of the last digit of the less precise number; 0 if both are exact.
    """
    found = Interval.printed(of, last) - Interval.printed(less, last)
    return found.from_printed(f"{written(of)} - {written(less)}")


@measure("number")
def mean(of: Quantities, last: Quantity = Fraction(0)) -> MeasureResult:
    """The unweighted mean of numbers.

    last: one unit of the last digit of the least precise number; 0 if all are exact.
    """
    found = Interval.printed(sum(of, Fraction(0)) / len(of), last)
    return found.from_printed(f"({' + '.join(map(written, of))}) / {len(of)}")


@measure("number")
def mean_score(of: list[Any], last: Quantity) -> MeasureResult:
    """The mean of printed scores over tasks.

    of: one score per task. A task with several scores, e.g. accuracy and F1, has a list of scores, whose mean counts as
    one score. last: one unit of the scores' last digit, e.g. 0.1.
    """
    tasks = [one if isinstance(one, list) else [one] for one in of]
    scores = [sum((Fraction(str(score)) for score in task), Fraction(0)) / len(task) for task in tasks]
    found = Interval.printed(sum(scores, Fraction(0)) / len(scores), last)
    return found.from_printed(f"({' + '.join(f'{float(one):g}' for one in scores)}) / {len(scores)}")


def quotient(of: Fraction, to: Fraction, last: Fraction) -> Interval:
    """Return the interval of possible values of `of / to`, if both are rounded to `last`. Both must be positive."""
    return Interval.printed(of, last) / Interval.printed(to, last)


def written(value: Fraction) -> str:
    """Return a number as text: a whole number with commas, another number with six digits."""
    return f"{int(value):,}" if value.denominator == 1 else f"{float(value):.6g}"
