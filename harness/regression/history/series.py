"""Series of a history: the values of one Cell, metric and place, one per night."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from harness.analysis import tracked_metrics
from harness.regression.history import decisions
from harness.regression.history.night_files import History


@dataclass(frozen=True)
class HistorySeries:
    """The values of one metric of a Cell at one place."""

    cell: str
    metric: str
    place: str
    """Its id."""
    nights: list[int]
    """Indices of the history's nights, ascending."""
    values: list[float]
    """Per night the median of the passes; of counted bytes and parameters the maximum."""
    passes: list[int]
    """Number of passes per night."""


def series(history: History, only: Container[str] | None = None) -> list[HistorySeries]:
    """Return the non-empty series of a history, or those of the Cells in `only`; each starts at its last reset.

    A new place (another machine, driver or torch) starts a new series.
    """
    table: dict[tuple[str, str], list[tuple[int, list[dict[str, float]]]]] = {}
    for index, night in enumerate(history.nights):
        passes: dict[tuple[str, str], list[dict[str, float]]] = {}
        for row in night.rows:
            if "values" in row and (only is None or row["cell"] in only):
                passes.setdefault((row["cell"], row["on"]), []).append(row["values"])
        for key, values in passes.items():
            table.setdefault(key, []).append((index, values))
    found = (
        _since(one, history)
        for (cell, place), nights in sorted(table.items(), key=lambda item: item[0])
        for one in _of_cell(cell, place, nights)
        if tracked_metrics.kind(one.metric)  # a newer harness may store more metrics
    )
    return [one for one in found if one.nights]


def _of_cell(cell: str, place: str, nights: list[tuple[int, list[dict[str, float]]]]) -> Iterator[HistorySeries]:
    """Yield the series of a Cell at a place, by metric. nights: per night its index and the values of its passes."""
    order = tuple(nights[0][1][0])
    if all(tuple(values) == order for _, passes in nights for values in passes):
        # The usual case. There may be millions of values, so they are not looked up one by one.
        indices, counts = [index for index, _ in nights], [len(passes) for _, passes in nights]
        rows = [_middles(order, passes) for _, passes in nights]
        columns = dict(zip(order, zip(*rows, strict=True), strict=True))
        for metric in sorted(order):
            yield HistorySeries(cell, metric, place, indices, list(columns[metric]), counts)
        return
    for metric in sorted({name for _, passes in nights for values in passes for name in values}):
        some = [(index, got) for index, passes in nights if (got := [one[metric] for one in passes if metric in one])]
        values = [_middle(metric, got) for _, got in some]
        yield HistorySeries(cell, metric, place, [index for index, _ in some], values, [len(got) for _, got in some])


def _since(one: HistorySeries, history: History) -> HistorySeries:
    """Return a series from its last reset on."""
    start = decisions.last_reset(history.resets, one.cell, one.metric) if history.resets else ""
    skip = sum(history.nights[i].night < start for i in one.nights) if start else 0
    return HistorySeries(one.cell, one.metric, one.place, one.nights[skip:], one.values[skip:], one.passes[skip:])


def _middles(order: Sequence[str], passes: list[dict[str, float]]) -> list[float]:
    """Return the value of each metric of a night; every pass has its metrics in this order."""
    together = zip(order, zip(*(values.values() for values in passes), strict=True), strict=True)
    return [got[0] if got.count(got[0]) == len(got) else _middle(metric, got) for metric, got in together]


@cache
def _is_counted(metric: str) -> bool:
    return tracked_metrics.kind(metric) == "counted"


def _middle(metric: str, values: Sequence[float]) -> float:
    if _is_counted(metric):
        return max(values)
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
