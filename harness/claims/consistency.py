"""Consistency of readings within a table of a paper. Imports no torch.

The convention of a table has three parts: one rounding for all figures, one unit for all figures of a dimension, and one
reading for all figures of a Method in one entry of the claim file. The convention that reproduces most figures is the
table's. The other reproduced figures get the verdict `reproduced-mixed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any, NamedTuple

from harness.analysis.grouping import group
from harness.claims.claim import Claim
from harness.claims.judge import ClaimVerdict, JudgedClaim, Missing
from harness.claims.measure import MeasureResult, measures
from harness.claims.printed_number import conventions

_NUMBERED = re.compile(r"tables? (\d+\w*(?:(?:, | and )\d+\w*)*)", re.IGNORECASE)
Answers = Sequence[MeasureResult | Missing]


class _Way(NamedTuple):
    """A way to reproduce a figure. Without arguments, it is the paper's own."""

    cut: bool = False
    unit: str = ""
    """Empty for the printed unit."""
    under: str = ""
    """The reading of the claim; empty for the paper's own."""


@dataclass(frozen=True)
class _Figure:
    """A reproduced figure of a table."""

    claim: Claim
    ways: Mapping[_Way, tuple[int, str]]
    """Each way to reproduce the figure -> index of the reading in `JudgedClaim.tried`, and what the figure needs, in
    words."""


_PARTS: Sequence[tuple[str, Callable[[_Way], Any], Callable[[Claim], Any]]] = (
    ("rounding", lambda way: way.cut, lambda claim: claim.paper),
    ("unit", lambda way: way.unit, lambda claim: claim.dimension),
    ("reading", lambda way: way.under, lambda claim: (claim.entry, claim.request.find("method"))),
)
"""Each part of a convention, and the key that groups claims. All figures of a group share this part."""


def tables_of(claim: Claim) -> list[str]:
    """Return the names of the tables at the start of the claim's source.

    For example, `Tables 2 and 9, appendix C` gives `["Table 2", "Table 9"]`.

    The parts of a table, such as 6a and 6b, are one table. A property has no figure, and a measurement at a smaller scale
    does not show how a figure must be read: for these the list is empty.
    """
    if claim.figure is None or claim.scale:
        return []
    if found := _NUMBERED.match(claim.source):
        return [f"Table {number}" for number in re.findall(r"\d+", found[1])]
    return [re.split("[,;]", claim.source)[0]] * claim.source.lower().startswith("table ")


def with_tables(selected: Iterable[Claim], every: Iterable[Claim]) -> list[Claim]:
    """Return the selected claims, and the other claims of their tables, which influence the verdicts."""
    ids = {claim.id for claim in selected}
    tables = {(claim.paper, table) for claim in selected for table in tables_of(claim)}
    return [
        claim
        for claim in every
        if claim.id in ids or not tables.isdisjoint((claim.paper, table) for table in tables_of(claim))
    ]


def with_table_conventions(judged: Iterable[tuple[Claim, Answers, JudgedClaim]]) -> list[JudgedClaim]:
    """Return the judged claims. A reproduced figure outside its table's convention becomes `reproduced-mixed`.

    judged: claim, one answer per reading, and verdict of the claim alone.
    """
    rows = {}
    figures = []
    for claim, answers, row in judged:
        rows[row.id] = row
        if row.verdict in (ClaimVerdict.REPRODUCED, ClaimVerdict.UNDER):
            figure = _figure(claim, answers)
            figures += [((claim.paper, table), figure) for table in tables_of(claim)]
    for (_, table), same in group(figures).items():
        ways = _convention([(figure, list(figure.ways)) for figure in same])
        for figure in same:
            row = rows[figure.claim.id]
            if figure.claim.id not in ways and row.verdict is not ClaimVerdict.MIXED:
                why = _why(table, figure, [(one, ways[one.claim.id]) for one in same if one.claim.id in ways])
                rows[row.id] = row.model_copy(update={"verdict": ClaimVerdict.MIXED, "why": why})
            elif row.verdict is ClaimVerdict.UNDER:
                index, under = figure.ways[ways[row.id]]
                one = row.tried[index]
                rows[row.id] = row.model_copy(update={"under": under, "ours": one.ours, "how": one.how})
    return list(rows.values())


def _figure(claim: Claim, answers: Answers) -> _Figure:
    ways: dict[_Way, tuple[int, str]] = {}
    readings = [("", claim.request), *((one.under, one.request) for one in claim.otherwise)]
    for index, ((under, request), answer) in enumerate(zip(readings, answers, strict=True)):
        if isinstance(answer, Missing) or claim.figure is None:
            continue
        most = None if answer.most is None else Fraction(answer.most)
        other = request.measure if measures()[request.measure].is_unit else ""
        for (cut, binary), words in conventions(claim.figure, Fraction(answer.value), claim.rounding, most).items():
            way = _Way(cut, other or "binary" * binary, under)
            simpler = [way._replace(cut=False, unit=other), way._replace(cut=False), way._replace(unit=other)]
            needs = next(
                (ways[one] for one in simpler if one in ways), (index, "; ".join(filter(None, [under, words])))
            )
            ways.setdefault(way, needs)
    return _Figure(claim, ways)


def _convention(figures: Sequence[tuple[_Figure, list[_Way]]], part: int = 0) -> dict[str, _Way]:
    """Return the figures that a table's convention reproduces, as id -> way. It is the convention with most figures.

    figures: each with the ways that agree with the parts of the convention before `part`.
    """
    if part == len(_PARTS):
        return {figure.claim.id: ways[0] for figure, ways in figures if ways}
    _, of_way, of_claim = _PARTS[part]
    found: dict[str, _Way] = {}
    for same in group((of_claim(figure.claim), (figure, ways)) for figure, ways in figures).values():
        options = dict.fromkeys(map(of_way, [_Way(), *(way for _, ways in same for way in ways)]))
        tried = [
            _convention([(figure, [way for way in ways if of_way(way) == option]) for figure, ways in same], part + 1)
            for option in options
        ]
        best: dict[str, _Way] = max(tried, key=len)  # the first of several, so the paper's own if it is among them
        found |= best
    return found


def _why(table: str, figure: _Figure, others: Iterable[tuple[_Figure, _Way]]) -> str:
    """Return the reason why a figure is outside its table's convention. others: the figures inside, and their ways."""

    def shared(other: _Figure) -> dict[str, Callable[[_Way], Any]]:
        return {name: of_way for name, of_way, of_claim in _PARTS if of_claim(figure.claim) == of_claim(other.claim)}

    for other, way in sorted(others, key=lambda one: -len(shared(one[0]))):
        parts = shared(other)
        for some in (some for count in range(1, len(parts) + 1) for some in combinations(parts, count)):
            if not any(all(parts[one](a) == parts[one](b) for one in some) for a in figure.ways for b in other.ways):
                needs = other.ways[way][1]
                agrees = f"agrees under: {needs}" if needs else "agrees as printed"
                another = " or ".join(some)
                return f"outside the convention of {table}: it needs another {another} than {other.claim.id}, which {agrees}"
    return f"outside the convention of {table}, which reproduces more figures than any that fits this one"
