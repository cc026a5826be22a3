"""Sums of tensor sizes, with the arithmetic as text. No torch."""

from __future__ import annotations

import math
from collections import Counter

from harness.claims.measure import MeasureResult

Sizes = Counter[tuple[int, ...]]
"""Shape -> number of tensors."""


def in_words(sizes: Sizes) -> str:
    """Return a sum of sizes as text: `24 of 8x768 + 24 of 768x8 = 294,912`."""
    terms = [
        f"{number:,} of {'x'.join(map(str, shape)) or '1'}" if number > 1 else "x".join(map(str, shape))
        for shape, number in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    return f"{' + '.join(terms) or '0'} = {total(sizes):,}"


def summed(sizes: Sizes) -> MeasureResult:
    """Return the number of elements as the result of a measure."""
    return MeasureResult(total(sizes), in_words(sizes))


def total(sizes: Sizes) -> int:
    """Return the number of elements."""
    return sum(number * math.prod(shape) for shape, number in sizes.items())
