"""Series of a history: the values of one Cell, metric and place (machine and software), one per night."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

from harness.analysis import tracked_metrics
from harness.regression.history import decisions
from harness.regression.history.night_files import History

_Nights = list[tuple[str, list[dict[str, float]]]]
"""One entry per night: the date, and a dict of values by metric for each pass (run of the suite)."""


@dataclass(frozen=True)
class HistorySeries:
    """Values of one metric for one Cell and place, in the order of nights."""

    cell: str
    metric: str
    place: str
    """Id of the place, i.e. of the machine and its software."""
    nights: list[str]
    """Dates of the nightly runs, ascending."""
    values: list[float]
    """One value per night: the median of the night's passes or, for counted bytes and parameters, the maximum."""
    passes: list[int]
    """Number of passes (runs of the suite) of each night."""

    @property
    def usual(self) -> float:
        """Median of the values."""
        return median(self.values)

    def document(self, name: str) -> dict[str, Any]:
        """Return the series for JSON. name: the name of its Cell."""
        return {"cell": self.cell, "name": name, **vars(self), "usual": self.usual}


def series(history: History, only: Container[str] | None = None) -> list[HistorySeries]:
    """Return all series of a history that have values. only: cell_ids of the Cells to include; None for all Cells.

    Each series starts at its last reset, i.e. where a user accepted its level. A new place (another machine, driver or
    torch) starts a new series.
    """
    table: dict[tuple[str, str], _Nights] = {}
    for night in history.nights:
        passes: dict[tuple[str, str], list[dict[str, float]]] = {}
        for row in night.rows:
            if "values" in row and (only is None or row["cell"] in only):
                passes.setdefault((row["cell"], row["on"]), []).append(row["values"])
        for key, values in passes.items():
            table.setdefault(key, []).append((night.night, values))
    found = (
        _since(one, history)
        for (cell, place), nights in sorted(table.items(), key=lambda item: item[0])
        for one in _of_cell(cell, place, nights)
        if tracked_metrics.kind(one.metric)  # a newer harness may store further metrics
    )
    return [one for one in found if one.nights]


def _of_cell(cell: str, place: str, nights: _Nights) -> Iterator[HistorySeries]:
    """Yield the series of a Cell at a place, one per metric."""
    order = tuple(nights[0][1][0])
    if all(tuple(values) == order for _, passes in nights for values in passes):
        # Usually, all passes have the same metrics. Then whole columns are used: millions of look-ups would be slow.
        dates, counts = [night for night, _ in nights], [len(passes) for _, passes in nights]
        columns = dict(zip(order, zip(*(_medians(order, passes) for _, passes in nights), strict=True), strict=True))
        for metric in sorted(order):
            yield HistorySeries(cell, metric, place, dates, list(columns[metric]), counts)
        return
    for metric in sorted({name for _, passes in nights for values in passes for name in values}):
        some = [(night, got) for night, passes in nights if (got := [one[metric] for one in passes if metric in one])]
        values = [_median(metric, got) for _, got in some]
        yield HistorySeries(cell, metric, place, [night for night, _ in some], values, [len(got) for _, got in some])


def _since(one: HistorySeries, history: History) -> HistorySeries:
    """Return the part of a series since the last reset, i.e. since a user last accepted its level."""
    start = decisions.last_reset(history.resets, one.cell, one.metric)
    skip = bisect_left(one.nights, start)
    return replace(one, nights=one.nights[skip:], values=one.values[skip:], passes=one.passes[skip:]) if skip else one


def _medians(order: Sequence[str], passes: list[dict[str, float]]) -> list[float]:
    """Return one value per metric for one night, in the order of `order`.

    passes: a dict of values by metric for each pass (run of the suite). The keys of each dict are `order`, in this
    order.
    """
    together = zip(order, zip(*(values.values() for values in passes), strict=True), strict=True)
    return [got[0] if got.count(got[0]) == len(got) else _median(metric, got) for metric, got in together]


@cache
def _is_counted(metric: str) -> bool:
    return tracked_metrics.kind(metric) == "counted"


def _median(metric: str, values: Sequence[float]) -> float:
    """Return the value of a night from the values of its passes: the maximum of a counted metric, else the median."""
    return max(values) if _is_counted(metric) else median(values)
