"""Find the largest batch or the longest text that fits, in few steps, because a step is slow. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_MAX_STEPS = 24
"""Maximum number of steps. Three usually suffice: one for the bytes per text, one that fits, and one that does not fit."""


def search(
    peak: Callable[[int], int | str], room: int, first: int, lasting: int, most: int | None = None, grain: float = 0.0
) -> dict[int, int] | str:
    """Try steps of several sizes. Return the peak in bytes of each tried size.

    If a step fails before any size has fitted, return the reason instead.

    peak: function that takes a size, and returns the peak of a step of this size in bytes, or the reason why the step
    failed. A larger size must have a larger peak. room: available bytes. first: first size to try. lasting: estimated
    bytes of a step of size 0. most: largest size to try. grain: relative tolerance. The search ends when the largest
    size that fits and the smallest size that does not fit differ by at most this share, or by 1.
    """
    tried: dict[int, int] = {}
    streak, last = 0, False
    size: int | None = first if most is None else min(first, most)
    while size is not None and len(tried) < _MAX_STEPS:
        found = peak(size)
        if isinstance(found, str):
            return tried if any(one <= room for one in tried.values()) else found
        tried[size] = found
        streak, last = streak + 1 if (found <= room) == last else 1, found <= room
        size = _next(tried, room, lasting, most, grain, streak)
    return tried


def largest_fitting(tried: Mapping[int, int], room: int) -> int:
    """Return the largest tried size with a peak of at most `room`. If there is none, return 0."""
    return max((n for n, peak in tried.items() if peak <= room), default=0)


def _next(tried: Mapping[int, int], room: int, lasting: int, most: int | None, grain: float, streak: int) -> int | None:
    """Return the next size to try. If the largest fitting size is known to within `grain`, return None.

    The lower bound is the largest size that fits, and the upper bound is the smallest size that does not fit. The
    function interpolates linearly between the bounds. If several steps in a row (`streak`) have moved the same bound,
    it bisects instead. The peak is not quite linear, because it is a maximum over stages.
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
    guess = fits + (room - taken) // each if each > 0 else 2 * fits  # each <= 0: `lasting` was overestimated
    if streak > 2:  # linear steps are too small
        guess = max(guess, 2 * fits)
    return max(fits + 1, guess if most is None else min(guess, most))
