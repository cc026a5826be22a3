"""Make a small sample of cases in which every pair of levels of two factors occurs. Imports no torch.

A factor is a setting of a case. Its levels are the values to try.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, int]
"""One case: factor -> index of its level."""
Pair = tuple[tuple[str, int], tuple[str, int]]
TRIES = 20
"""Largest number of random rows that `covering` tries as starting points, to find a valid row with a given pair."""


def every_pair(levels: Mapping[str, Sequence[Any]]) -> list[Pair]:
    """Return every pair of levels of two different factors."""
    return [
        ((one, i), (other, j))
        for one, other in itertools.combinations(levels, 2)
        for i in range(len(levels[one]))
        for j in range(len(levels[other]))
    ]


def one_at_a_time(levels: Mapping[str, Sequence[Any]], names: Iterable[str]) -> Iterator[Row]:
    """Yield every row in which exactly one factor, one of `names`, is not at its first level."""
    for name in names:
        yield from (dict.fromkeys(levels, 0) | {name: level} for level in range(1, len(levels[name])))


def each_value(
    plain: Mapping[str, Any], wanted: Mapping[str, Sequence[Any]], valid: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Yield few cases, as values of all factors, in which every wanted value occurs. An invalid value is left out.

    plain: factor -> its plainest value. Every case begins with these values. Then every factor gets its next wanted value
    that leaves the case valid.
    """
    missing = {name: list(values) for name, values in wanted.items()}
    while any(missing.values()):
        chosen = dict(plain)
        for name, values in missing.items():
            fitting = next((value for value in values if valid(chosen | {name: value})), None)
            if fitting is not None:
                chosen[name] = fitting
                values.remove(fitting)
        if chosen == plain:
            return
        yield chosen


def covering(
    levels: Mapping[str, Sequence[Any]],
    wanted: Iterable[Pair],
    valid: Callable[[dict[str, Any]], bool],
    given: Iterable[Row] = (),
) -> list[Row]:
    """Return rows that contain the wanted pairs of levels. A pair is left out if no valid row is found for it.

    valid: returns whether the values of a row can be tried. given: existing rows, whose pairs the result need not
    contain.

    Each row begins with one missing pair. Every other factor gets the level that adds most missing pairs. If this row
    is not valid, a valid row is made from another starting point: the row of all first levels, an earlier row or a
    random row, with the pair put in. Then every other factor gets the level that adds most missing pairs and leaves the
    row valid.
    """

    def fits(row: Row) -> bool:
        return valid(values(row, levels))

    known, rows, missing = list(given), list[Row](), dict.fromkeys(wanted)
    for row in known:
        _cover(missing, row, levels)
    while missing:
        pair = next(iter(missing))
        row = _filled(pair, missing, levels, {}, lambda _: True)
        if not fits(row):
            starts = itertools.chain([dict.fromkeys(levels, 0)], known, rows, _at_random(levels))
            start = next(filter(fits, (one | dict(pair) for one in starts)), None)
            if start is None:
                del missing[pair]
                continue
            row = _filled(pair, missing, levels, start, fits)
        _cover(missing, row, levels)
        rows.append(row)
    return rows


def _at_random(levels: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    chance = random.Random(0)  # noqa: S311
    return ({name: chance.randrange(len(levels[name])) for name in levels} for _ in range(TRIES))


def _filled(
    pair: Pair,
    missing: Mapping[Pair, None],
    levels: Mapping[str, Sequence[Any]],
    start: Row,
    fits: Callable[[Row], bool],
) -> Row:
    """Return a row that contains `pair` and many of the missing pairs.

    The factors outside `pair` get their levels one after the other. Each gets the level that adds most missing pairs,
    among the levels that `fits` accepts. `fits` tests a whole row: a factor without a level yet has its level of
    `start`.
    """
    row = dict(pair)
    for name in levels:
        if name not in row:
            gains = [
                sum(_key(levels, (name, level), other) in missing for other in row.items())
                for level in range(len(levels[name]))
            ]
            best_first = sorted(range(len(gains)), key=lambda level: -gains[level])
            row[name] = next(level for level in best_first if fits(start | row | {name: level}))
    return row


def _cover(missing: dict[Pair, None], row: Row, levels: Iterable[str]) -> None:
    for one, other in itertools.combinations([name for name in levels if name in row], 2):
        missing.pop(((one, row[one]), (other, row[other])), None)


def _key(levels: Mapping[str, Sequence[Any]], one: tuple[str, int], other: tuple[str, int]) -> Pair:
    order = list(levels)
    return (one, other) if order.index(one[0]) < order.index(other[0]) else (other, one)


def values(row: Row, levels: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Map each factor to its level in `row`."""
    return {name: levels[name][row[name]] for name in levels}
