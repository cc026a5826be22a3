"""The numbers of a history as series: of one Cell, one metric and one place, a value per night."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from harness.analysis import watched
from harness.history import decisions
from harness.history.files import History


@dataclass(frozen=True)
class Series:
    """nights: indices into the history's nights, rising. values: of each, the median of its passes (of what is counted,
    the largest). passes: how many there were."""

    cell: str
    metric: str
    on: str
    nights: list[int]
    values: list[float]
    passes: list[int]


def series(history: History, only: Container[str] | None = None) -> list[Series]:
    """Return the series of a history, or those of some Cells; each begins at its last reset. Without an empty one.

    Never of two places: another machine, driver or torch begins another series.
    """
    table: dict[tuple[str, str], dict[str, Series]] = {}
    for index, night in enumerate(history.nights):
        passes: dict[tuple[str, str], list[dict[str, float]]] = {}
        for row in night.rows:
            if "values" in row and (only is None or row["cell"] in only):
                passes.setdefault((row["cell"], row["on"]), []).append(row["values"])
        for (cell, on), values in passes.items():
            known = table.setdefault((cell, on), {})
            for metric in values[0] if len(values) == 1 else {name: None for of in values for name in of}:
                one = known.get(metric)
                if one is None:
                    one = known[metric] = Series(cell, metric, on, [], [], [])
                got = [of[metric] for of in values if metric in of]
                one.nights.append(index)
                one.values.append(got[0] if got.count(got[0]) == len(got) else _middle(metric, got))
                one.passes.append(len(got))
    found = (
        _since(known[metric], history)
        for _, known in sorted(table.items())
        for metric in sorted(known)
        if watched.kind(metric)  # a newer harness may keep more
    )
    return [one for one in found if one.nights]


def _since(one: Series, history: History) -> Series:
    """Return a series from its last reset on."""
    start = decisions.start(history.resets, one.cell, one.metric) if history.resets else ""
    skip = sum(history.nights[i].night < start for i in one.nights) if start else 0
    return Series(one.cell, one.metric, one.on, one.nights[skip:], one.values[skip:], one.passes[skip:])


def _middle(metric: str, values: list[float]) -> float:
    if watched.kind(metric) == "counted":
        return max(values)
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
