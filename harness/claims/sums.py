"""Sums of tensor sizes, as numbers and as text. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from harness.claims.measure import MeasureResult

Shape = tuple[int, ...]


def in_words(shapes: Iterable[Shape]) -> str:
    """Return the sum of the sizes of tensors as text, such as `24 of 8x768 + 24 of 768x8 = 294,912`."""
    counts = Counter(map(tuple, shapes))
    terms = [
        f"{number:,} of {'x'.join(map(str, shape)) or '1'}" if number > 1 else "x".join(map(str, shape))
        for shape, number in counts.most_common()
    ]
    return f"{' + '.join(terms) or '0'} = {total(counts.elements()):,}"


def summed(shapes: Iterable[Shape]) -> MeasureResult:
    """Return a MeasureResult with the number of elements of tensors with these shapes."""
    every = list(shapes)
    return MeasureResult(total(every), in_words(every))


def total(shapes: Iterable[Shape]) -> int:
    """Return the number of elements of tensors with these shapes."""
    return sum(map(math.prod, shapes))
