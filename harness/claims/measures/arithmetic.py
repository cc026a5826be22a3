"""Measures: arithmetic with what a paper prints, or with what other measures find. No torch."""

from __future__ import annotations

from fractions import Fraction

from harness.claims.measuring import Count, Counts, Found, Quantity, Sizes, measure


@measure("ratio")
def ratio(of: Quantity, to: Quantity) -> Found:
    """How many times `to` goes into `of`."""
    return Found(of / to, f"{written(of)} / {written(to)}")


@measure("share")
def share(of: Quantity, to: Quantity) -> Found:
    """`of` as a share of `to`."""
    return Found(of / to, f"{written(of)} / {written(to)}")


@measure("share")
def share_less(of: Quantity, than: Quantity) -> Found:
    """By which share `of` is less than `than`."""
    return Found(1 - of / than, f"1 - {written(of)} / {written(than)}")


@measure("share")
def share_more(of: Quantity, than: Quantity) -> Found:
    """By which share `of` is more than `than`."""
    return Found(of / than - 1, f"{written(of)} / {written(than)} - 1")


@measure("count")
def count_sum(of: Counts) -> Found:
    """The sum of counts."""
    return Found(sum(of, Fraction(0)), " + ".join(map(written, of)))


@measure("count")
def count_product(of: Counts) -> Found:
    """The product of counts."""
    product = Fraction(1)
    for one in of:
        product *= one
    return Found(product, " x ".join(map(written, of)))


@measure("bytes")
def bytes_sum(of: Sizes) -> Found:
    """The sum of bytes."""
    return Found(sum(of, Fraction(0)), " + ".join(f"{written(one)} B" for one in of))


@measure("bytes")
def bytes_of(count: Count, each: Quantity) -> Found:
    """So many numbers of `each` bytes: 2 of 16 bits, 12 of weights, gradients and Adam's moments at 2 + 2 + 8."""
    return Found(count * each, f"{written(count)} x {written(each)} B")


@measure("number")
def difference(of: Quantity, less: Quantity) -> Found:
    """`of` less `less`."""
    return Found(of - less, f"{written(of)} - {written(less)}")


def written(value: Fraction) -> str:
    """Write a number out: whole with commas, else with six digits."""
    return f"{int(value):,}" if value.denominator == 1 else f"{float(value):.6g}"
