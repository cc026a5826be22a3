"""A small sample of cases in which every pair of levels of two factors occurs. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, int]
"""Factor -> index of its level."""
Pair = tuple[tuple[str, int], tuple[str, int]]


def every_pair(levels: Mapping[str, Sequence[Any]]) -> list[Pair]:
    """List every pair of levels of two different factors."""
    return [
        ((one, i), (other, j))
        for one, other in itertools.combinations(levels, 2)
        for i in range(len(levels[one]))
        for j in range(len(levels[other]))
    ]


def every_level(levels: Mapping[str, Sequence[Any]], beside: str) -> list[Pair]:
    """Pair every level of every other factor with the first level of `beside`, the last factor; list the pairs."""
    return [((name, i), (beside, 0)) for name in levels if name != beside for i in range(len(levels[name]))]


def covering(
    levels: Mapping[str, Sequence[Any]],
    wanted: Iterable[Pair],
    valid: Callable[[dict[str, Any]], bool],
    given: Iterable[Row] = (),
) -> list[Row]:
    """Return rows that contain the wanted pairs of levels, as far as valid rows contain these pairs.

    The result is deterministic. Each row begins with a pair that is still missing. For every other factor, the row takes
    the level that adds most missing pairs. valid: returns whether the values of a row can be tried. given: rows that exist
    already, so that the result need not contain their pairs.
    """
    names = list(levels)
    missing = dict.fromkeys(wanted)
    for row in given:
        _cover(missing, row, names)
    rows: list[Row] = []
    while missing:
        pair = next(iter(missing))
        found = next((row for row in _completed(pair, missing, levels) if valid(values(row, levels))), None)
        if found is None:
            del missing[pair]
            continue
        _cover(missing, found, names)
        rows.append(found)
    return rows


def _completed(pair: Pair, missing: Mapping[Pair, None], levels: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """Yield rows with `pair`: first the row that covers most missing pairs, then this row with one factor changed, then
    ever plainer rows.
    """
    row = dict(pair)
    for name in levels:
        if name not in row:
            row[name] = max(
                range(len(levels[name])),
                key=lambda level: sum(_key(levels, (name, level), at) in missing for at in row.items()),
            )
    yield row
    changeable = [name for name in levels if name not in dict(pair)]
    for name in changeable:
        for level in range(len(levels[name])):
            yield row | {name: level}
    plain = dict(row)
    for name in changeable:
        plain[name] = 0
        yield dict(plain)


def _cover(missing: dict[Pair, None], row: Row, names: Sequence[str]) -> None:
    for one, other in itertools.combinations([name for name in names if name in row], 2):
        missing.pop(((one, row[one]), (other, row[other])), None)


def _key(levels: Mapping[str, Sequence[Any]], one: tuple[str, int], other: tuple[str, int]) -> Pair:
    order = list(levels)
    return (one, other) if order.index(one[0]) < order.index(other[0]) else (other, one)


def values(row: Row, levels: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Map the names of factors to the levels in a row."""
    return {name: levels[name][row[name]] for name in levels}
