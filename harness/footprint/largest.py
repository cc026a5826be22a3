"""The largest number of texts, or of tokens in one, whose step fits, found by few steps: each is dear. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_ROUNDS = 10
"""Steps at most; three mostly do: what a text takes, what fits, and that one more does not."""


def find(
    peak: Callable[[int], int | str], room: int, first: int, lasting: int, most: int | None = None, grain: float = 0.0
) -> dict[int, int] | str:
    """Return the peaks of the steps that were tried, by their numbers; or why there is none.

    peak: the bytes of a step of so many, or why it cannot be taken. room: bytes that it may take. first: the number to
    begin with. lasting: about what a step of none would take. most: no larger number is asked for. grain: two numbers are
    close enough, of which the one fits and the other, larger by this share at most, does not.
    """
    tried: dict[int, int] = {}
    ask: int | None = first if most is None else min(first, most)
    while ask is not None and len(tried) < _ROUNDS:
        found = peak(ask)
        if isinstance(found, str):
            return tried if any(one <= room for one in tried.values()) else found
        tried[ask] = found
        ask = _next(tried, room, lasting, most, grain)
    return tried


def fitting(tried: Mapping[int, int], room: int) -> int:
    """Return the largest number that fits; 0 where none does."""
    return max((n for n, peak in tried.items() if peak <= room), default=0)


def _next(tried: Mapping[int, int], room: int, lasting: int, most: int | None, grain: float) -> int | None:
    """Return what to try next; None where it is known, within the grain, what fits and what no longer does."""
    fits = fitting(tried, room)
    fails = min((n for n, peak in tried.items() if peak > room), default=None)
    if fits == most or (fails is not None and fails - fits <= max(1, grain * fits)):
        return None
    (low, least), (high, taken) = sorted([(0, lasting), *tried.items()])[-2:]
    each = (taken - least) // (high - low)  # less than nothing where what lasts was thought far too large
    guess = high + (room - taken) // each if each > 0 else 2 * high
    guess = max(fits + 1, guess if fails is None else min(guess, fails - 1))
    return guess if most is None else min(guess, most)
