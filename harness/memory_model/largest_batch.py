"""The largest number of texts, or of tokens in one, whose step fits, found by few steps: each is dear. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_ROUNDS = 24
"""Steps at most; three mostly do: what a text takes, what fits, and that one more does not."""


def search(
    peak: Callable[[int], int | str], room: int, first: int, lasting: int, most: int | None = None, grain: float = 0.0
) -> dict[int, int] | str:
    """Return the peaks of the steps that were tried, by their numbers; or why there is none.

    peak: the bytes of a step of so many, or why it cannot be taken; it never falls as they become more. room: bytes that it
    may take. first: the number to begin with. lasting: about what a step of none would take. most: no larger number is asked
    for. grain: two numbers are close enough, of which the one fits and the other, larger by this share at most, does not.
    """
    tried: dict[int, int] = {}
    streak, last = 0, False
    ask: int | None = first if most is None else min(first, most)
    while ask is not None and len(tried) < _ROUNDS:
        found = peak(ask)
        if isinstance(found, str):
            return tried if any(one <= room for one in tried.values()) else found
        tried[ask] = found
        streak, last = streak + 1 if (found <= room) == last else 1, found <= room
        ask = _next(tried, room, lasting, most, grain, streak)
    return tried


def largest_fitting(tried: Mapping[int, int], room: int) -> int:
    """Return the largest number that fits; 0 where none does."""
    return max((n for n, peak in tried.items() if peak <= room), default=0)


def _next(tried: Mapping[int, int], room: int, lasting: int, most: int | None, grain: float, streak: int) -> int | None:
    """Return what to try next; None where it is known, within the grain, what fits and what no longer does.

    Between the two along a straight line, or in the middle where the last two steps moved the same one of them (`streak`): a
    peak is bent, as it is the highest of several stages.
    """
    fits = largest_fitting(tried, room)
    fails = min((n for n, peak in tried.items() if peak > room), default=None)
    if fits == most or (fails is not None and fails - fits <= max(1, grain * fits)):
        return None
    taken = tried.get(fits, lasting)
    if fails is not None:
        way, climbs = fails - fits, tried[fails] - taken
        on_line = fits + (room - taken) * way // climbs if climbs > 0 and room > taken else fits + way // 2
        return min(max(fits + way // 2 if streak > 1 else on_line, fits + 1), fails - 1)
    before = max((n for n in tried if n < fits), default=0)
    each = (taken - tried.get(before, lasting)) // (fits - before)
    guess = fits + (room - taken) // each if each > 0 else 2 * fits  # none each: what lasts was thought too large
    if streak > 2:  # a line that stays behind is bent
        guess = max(guess, 2 * fits)
    return max(fits + 1, guess if most is None else min(guess, most))
