"""Measures: arithmetic with printed numbers or results of other measures. No torch."""

from __future__ import annotations

from fractions import Fraction

from harness.claims.measure import Count, Counts, MeasureResult, Quantity, Sizes, measure


@measure("ratio")
def ratio(of: Quantity, to: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """The ratio `of` / `to`. last: for printed figures, a unit in the last digit of the coarser one."""
    return MeasureResult(of / to, f"{written(of)} / {written(to)}", within=quotients(of, to, last) if last else None)


@measure("share")
def share(of: Quantity, to: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """`of` as a share of `to`. last: for printed figures, a unit in the last digit of the coarser one."""
    return MeasureResult(of / to, f"{written(of)} / {written(to)}", within=quotients(of, to, last) if last else None)


@measure("share")
def share_less(of: Quantity, than: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """Relative reduction of `of` from `than`. last: for printed figures, a unit in the last digit of the coarser one."""
    least, most = quotients(of, than, last)
    return MeasureResult(
        1 - of / than, f"1 - {written(of)} / {written(than)}", within=(1 - most, 1 - least) if last else None
    )


@measure("share")
def share_more(of: Quantity, than: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """Relative increase of `of` over `than`. last: for printed figures, a unit in the last digit of the coarser one."""
    least, most = quotients(of, than, last)
    return MeasureResult(
        of / than - 1, f"{written(of)} / {written(than)} - 1", within=(least - 1, most - 1) if last else None
    )


@measure("count")
def count_sum(of: Counts) -> MeasureResult:
    """The sum of counts."""
    return MeasureResult(sum(of, Fraction(0)), " + ".join(map(written, of)))


@measure("count")
def count_product(of: Counts) -> MeasureResult:
    """The product of counts."""
    product = Fraction(1)
    for one in of:
        product *= one
    return MeasureResult(product, " x ".join(map(written, of)))


@measure("bytes")
def bytes_sum(of: Sizes, last: Quantity = Fraction(0)) -> MeasureResult:
    """The sum of bytes. last: for printed figures, a unit in the last digit of the coarsest one."""
    found = sum(of, Fraction(0))
    half = len(of) * last / 2  # half a last digit of each
    within = (found - half, found + half) if last else None
    return MeasureResult(found, " + ".join(f"{written(one)} B" for one in of), within=within)


@measure("bytes")
def bytes_of(count: Count, each: Quantity) -> MeasureResult:
    """`count` numbers of `each` bytes: 2 in 16 bits, 12 with weights, gradients and Adam's moments at 2 + 2 + 8."""
    return MeasureResult(count * each, f"{written(count)} x {written(each)} B")


@measure("number")
def difference(of: Quantity, less: Quantity, last: Quantity = Fraction(0)) -> MeasureResult:
    """`of` - `less`. last: for printed figures, a unit in the last digit of the coarser one."""
    found = of - less  # half a last digit of each
    return MeasureResult(
        found, f"{written(of)} - {written(less)}", within=(found - last, found + last) if last else None
    )


def quotients(of: Fraction, to: Fraction, last: Fraction) -> tuple[Fraction, Fraction]:
    """Return the range of `of / to` for positive numbers rounded to `last`."""
    half = last / 2
    return (of - half) / (to + half), (of + half) / (to - half)


def written(value: Fraction) -> str:
    """Return a number as text: whole with commas, else with six digits."""
    return f"{int(value):,}" if value.denominator == 1 else f"{float(value):.6g}"
