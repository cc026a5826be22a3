"""Sums of the sizes of tensors, with the arithmetic in words. No torch."""

from __future__ import annotations

import math
from collections import Counter

from harness.claims.measure import MeasureResult

Sizes = Counter[tuple[int, ...]]
"""How many tensors there are of each shape."""


def in_words(sizes: Sizes) -> str:
    """Write a sum of sizes down: `24 of 8x768 + 24 of 768x8 = 294,912`."""
    several = [
        f"{number:,} of {'x'.join(map(str, shape)) or '1'}" if number > 1 else "x".join(map(str, shape))
        for shape, number in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    return f"{' + '.join(several) or '0'} = {total(sizes):,}"


def summed(sizes: Sizes) -> MeasureResult:
    """Return the number of elements as a measure finds it, with its sum."""
    return MeasureResult(total(sizes), in_words(sizes))


def total(sizes: Sizes) -> int:
    """Return the number of elements."""
    return sum(number * math.prod(shape) for shape, number in sizes.items())
