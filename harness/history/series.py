"""The numbers of a history as series: of one Cell, one metric and one place, a value per night."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from harness.analysis import watched
from harness.history import decisions
from harness.history.files import History

_Passes = dict[int, list[float]]


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
    table: dict[tuple[str, str], dict[str, _Passes]] = {}
    for index, night in enumerate(history.nights):
        for row in night.rows:
            if only is not None and row["cell"] not in only:
                continue
            metrics = table.setdefault((row["cell"], row["on"]), {})
            for metric, value in row.get("values", {}).items():
                per_night = metrics.get(metric)
                if per_night is None:
                    per_night = metrics[metric] = {}
                if index in per_night:
                    per_night[index].append(value)
                else:
                    per_night[index] = [value]
    found = (
        _one(history, cell, metric, on, metrics[metric])
        for (cell, on), metrics in sorted(table.items())
        for metric in sorted(metrics)
        if watched.kind(metric)  # a newer harness may keep more
    )
    return [one for one in found if one.nights]


def _one(history: History, cell: str, metric: str, on: str, passes: _Passes) -> Series:
    start = decisions.start(history.resets, cell, metric) if history.resets else ""
    nights = [i for i in sorted(passes) if history.nights[i].night >= start]
    middle = max if watched.kind(metric) == "counted" else _median
    return Series(cell, metric, on, nights, [middle(passes[i]) for i in nights], [len(passes[i]) for i in nights])


def _median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
