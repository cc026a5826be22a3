"""Hypothesis strategies for the factors of a case."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from harness.conformance.drawing.factors import ELEMENTS, Factor

LARGEST_SIDE = 4096
LEAST_NUMBER = 2.0**-126
"""Smallest normal number of float32."""


def of_factor(factor: Factor) -> st.SearchStrategy[Any]:
    """Return a Hypothesis strategy for the values of one factor.

    If the factor has bounds or dimensions, half of the drawn values are its levels or extreme values; otherwise all
    are. A failure shrinks to the first level.
    """
    levels = st.sampled_from((*factor.levels, *factor.extremes))
    drawn: st.SearchStrategy[Any]
    if factor.dimensions and factor.least is not None and factor.most is not None:
        whole = st.integers(int(factor.least), int(factor.most))
        least, most = min(factor.dimensions), max(factor.dimensions)
        drawn = st.lists(whole, min_size=least, max_size=most).map(tuple)
    elif factor.dimensions:
        drawn = st.sampled_from(factor.dimensions).flatmap(lambda n: sizes(n, int(factor.most or ELEMENTS)))
    elif factor.least is None or factor.most is None:
        return levels
    elif isinstance(factor.levels[0], int):
        drawn = st.one_of(_whole(int(factor.least), int(factor.most)), st.integers(int(factor.least), int(factor.most)))
    else:
        drawn = st.floats(factor.least, factor.most, allow_nan=False).map(_rounded)
    return st.one_of(levels, drawn)


def _rounded(number: float) -> float:
    """Round to three digits. A number below the normal numbers of float32 becomes 0."""
    return float(f"{number:.3g}") if abs(number) >= LEAST_NUMBER else 0.0


def case_values(factors: dict[str, Factor]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for dicts with one value of every factor."""
    return st.fixed_dictionaries({name: of_factor(factor) for name, factor in factors.items()})


@st.composite
def sizes(draw: st.DrawFn, dimensions: int, elements: int) -> tuple[int, ...]:
    """Draw the sizes of a tensor with at most `elements` elements. Small sizes are as likely as large ones."""
    sides: list[int] = []
    left = elements
    for _ in range(dimensions):
        sides.append(draw(_whole(1, max(1, min(LARGEST_SIDE, left)))))
        left //= sides[-1]
    return tuple(draw(st.permutations(sides)))


def _whole(least: int, most: int) -> st.SearchStrategy[int]:
    """Return a Hypothesis strategy for whole numbers from `least` to `most`.

    The ranges from `least` to 2 `least`, from 2 `least` to 4 `least` and so on are equally likely.
    """
    low = max(1, least)
    exponents = st.integers(0, max(1, most // low).bit_length() - 1)  # not by a logarithm, which rounds 2**63 - 1 up
    return exponents.flatmap(lambda e: st.integers(low << e, min(most, (low << (e + 1)) - 1)))
