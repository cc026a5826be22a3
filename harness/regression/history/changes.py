"""Find changes of level in the series of a history.

A series holds one value per night, for one metric of a Cell at one place (machine and software). The machine may be
slower on some nights than on others. So each time is divided by the anchor of its night. For the anchor, each series of
the place gives a ratio: its value on this night divided by its usual value. The anchor is the median of these ratios.
Changes of the anchor itself, of bytes, parameters and scores are found too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from harness.analysis import tracked_metrics
from harness.analysis.statistics import anchor, change_points
from harness.analysis.statistics.change_points import FEWEST, LevelChange
from harness.regression.history.night_files import EVERY, NEAR, Fields, History
from harness.regression.history.series import HistorySeries

if TYPE_CHECKING:
    from harness.analysis.statistics.change_points import Array

TIMED_LEAST = 0.02
"""Smallest relative change of a time that is reported. Pairs of runs can confirm a change of this size at a reasonable
cost."""
SCORE_LEAST = 0.01
"""Smallest change of an accuracy that is reported: one percentage point."""
_SCORE_FLOOR = SCORE_LEAST / 5


@dataclass(frozen=True)
class Change:
    """A change in the level of one series."""

    cell: str
    """A cell_id; `*` if the times of all Cells at one place (machine and software) changed together."""
    metric: str
    place: str
    old_night: str
    """Last night of the old level."""
    night: str
    """First night of the new level."""
    before: float
    """Old level, in the unit of the metric. Times are first divided by the anchor of their night (see this module). If
    `cell` is `*`, it is the level of the anchor, which has no unit."""
    after: float
    """New level, in the unit of `before`."""
    worse: bool
    settled: str | None = None
    """First night on which the old level was back. None if the new level lasts."""
    counted: bool = False
    """True if the metric is an exact count of bytes or parameters, so that the change needs no confirmation."""
    recent: bool = False
    """True if the new level has lasted only one or two nights, so that the change is only suspected. Also
    True for the changes of `confirmed_regressions`."""
    note: str = ""

    @property
    def change(self) -> float | None:
        """The size of the change.

        For a score, it is `after` - `before`. For other metrics, it is `after` / `before` - 1, or None if `before` is
        0.
        """
        if tracked_metrics.kind(self.metric) == "score":
            return self.after - self.before
        return self.after / self.before - 1 if self.before else None

    def document(self, name: str) -> dict[str, Any]:
        """Return the change for JSON. name: the name of its Cell."""
        return {
            "cell": self.cell, "name": name, "metric": self.metric, "place": self.place, "night": self.night,
            "before": self.before, "after": self.after, "change": self.change, "worse": self.worse,
            "settled": self.settled, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True)
class Unanchored:
    """Times that are not divided by an anchor, because their place (machine and software) has too few series.

    The anchor shows how slow the whole machine was on a night. Without it, a slow night looks like a change.
    """

    place: str
    metric: str
    """Start of the metrics' names, up to the first `/`, e.g. `latency_s`."""
    series: int


@dataclass(frozen=True)
class Unjudged:
    """Nights whose times are not judged, because their place (machine and software) had too few series on these nights.

    So their anchor, i.e. how slow the whole machine was, is unknown.
    """

    place: str
    metric: str
    """Start of the metrics' names, up to the first `/`, e.g. `latency_s`."""
    nights: list[str]


@dataclass
class FoundChanges:
    """Changes that were found in all series, and what could not be judged."""

    history: History
    last: str
    """Date of the last night in any series."""
    changes: list[Change] = field(default_factory=list)
    machine: list[Change] = field(default_factory=list)
    """Changes of the machine: all series of a place show them, even those of Cells whose code never changes."""
    unanchored: list[Unanchored] = field(default_factory=list)
    unjudged: list[Unjudged] = field(default_factory=list)
    compared: int = 0
    """Number of series that are long enough to show a change."""


def find_changes(history: History, series: Sequence[HistorySeries], sentinels: frozenset[str]) -> FoundChanges:
    """Return the changes that are found in the series of a history.

    sentinels: cell_ids of Cells whose code does not change. If the times of these Cells change, the machine has
    changed. Changes of these times, and of the times of bare base models, are never reported.
    """
    found = FoundChanges(history, last=max((one.nights[-1] for one in series), default=""))
    kinds: dict[str | None, list[HistorySeries]] = {}
    for one in series:
        kinds.setdefault(tracked_metrics.kind(one.metric), []).append(one)
    for one in kinds.get("counted", []) + kinds.get("peak", []):
        found.compared += len(one.nights) > 1
        found.changes += _counted(one)
    if scores := [one for one in kinds.get("score", []) if len(one.nights) >= FEWEST]:
        _scores(scores, found)
    families: dict[tuple[str, str], list[HistorySeries]] = {}
    guards: dict[str, list[HistorySeries]] = {}
    for one in kinds.get("timed", []):
        if one.cell in sentinels or _is_of_base(one, history.cells):
            guards.setdefault(one.place, []).append(one)
        else:
            families.setdefault((one.place, one.metric.partition("/")[0]), []).append(one)
    for (place, family), judged in sorted(families.items(), key=lambda item: item[0]):
        _timed(family, judged, guards.get(place, []), found)
    return found


def _is_of_base(one: HistorySeries, cells: Mapping[str, Fields]) -> bool:
    base = cells.get(one.cell, {}).get("base")
    return tracked_metrics.sentinel(one.metric, str(base.get("quantization", "")) if isinstance(base, dict) else "")


def _counted(one: HistorySeries) -> Iterator[Change]:
    """Yield a change for each night on which bytes or parameters leave their level by more than the metric's slack."""
    if min(one.values) == max(one.values):
        return
    levels = [("", one.nights[0], one.values[0])]  # (last night of the level before, first night, value) of each level
    for last, night, value in zip(one.nights, one.nights[1:], one.values[1:], strict=False):
        level = levels[-1][2]
        if abs(value - level) > tracked_metrics.slack(one.metric, level):
            levels.append((last, night, value))
    counted = tracked_metrics.kind(one.metric) == "counted"
    for number, ((_, _, old), (last, night, new)) in enumerate(pairwise(levels)):
        worse, allowed = tracked_metrics.got_worse(one.metric, old, new), tracked_metrics.slack(one.metric, old)
        back = (n for _, n, later in levels[number + 2 :] if (later <= old + allowed if new > old else later == old))
        yield Change(one.cell, one.metric, one.place, last, night, old, new, worse, next(back, None), counted=counted)


def _scores(scores: Sequence[HistorySeries], found: FoundChanges) -> None:
    import numpy as np

    values = [np.array(one.values, dtype=float) for one in scores]
    shared = float(np.median([change_points.noise(v) for v in values]))
    for one, v in zip(scores, values, strict=True):
        found.compared += 1
        steps = change_points.steps(v, least=SCORE_LEAST, shared=shared, floor=_SCORE_FLOOR)
        found.changes += _changes(one, one.nights, steps, SCORE_LEAST)


def _timed(family: str, judged: Sequence[HistorySeries], guards: Sequence[HistorySeries], found: FoundChanges) -> None:
    """Judge the times of one family of metrics at one place, relative to the anchor. Then judge the anchor itself.

    Metrics of one family have names with the same text before the first `/`, e.g. `latency_s`. judged: the series of
    the family. guards: series of sentinels, i.e. of Cells whose code does not change. The changes are added to `found`.
    """
    import numpy as np

    place = judged[0].place
    nights = sorted({night for one in (*judged, *guards) for night in one.nights})
    logs = _logs(judged, nights)
    common = anchor.anchor(logs)
    if not np.isfinite(common).any():
        found.unanchored.append(Unanchored(place, family, len(judged)))
        relative = logs
    else:
        relative = logs - common
        if unanchored := [night for night, value in zip(nights, common, strict=True) if math.isnan(value)]:
            found.unjudged.append(Unjudged(place, family, unanchored))
    rows = [(one, np.flatnonzero(np.isfinite(row)), row) for one, row in zip(judged, relative, strict=True)]
    rows = [(one, present, row[present]) for one, present, row in rows if len(present) >= FEWEST]
    noises = [change_points.noise(row) for _, _, row in rows]
    shared = float(np.median(noises)) if rows else 0.0
    for (one, present, row), noise in zip(rows, noises, strict=True):
        found.compared += 1
        own = nights if len(present) == len(nights) else [nights[i] for i in present]
        changes = _log_changes(one, own, row, shared, noise)
        found.changes += changes
        if own[-1] == found.last:
            since = own.index(changes[-1].night) if changes else 0
            least = math.log1p(TIMED_LEAST)
            if step := change_points.suspect(row, since=since, least=least, shared=shared, own=noise):
                night, before, after = own[step.at - 1], math.exp(step.before), math.exp(step.after)
                found.changes.append(
                    Change(one.cell, one.metric, place, night, own[-1], before, after, worse=True, recent=True)
                )
    _anchor(HistorySeries(EVERY, family, place, nights, [], []), common, _logs(guards, nights), found)


def _anchor(one: HistorySeries, common: Array, guards: Array, found: FoundChanges) -> None:
    """Judge the anchor of a place, i.e. how slow the whole machine was on each night. Add its changes to `found`.

    Sentinels are Cells whose code does not change. If the sentinels change with the anchor, the machine has changed.
    Otherwise the code under test has changed. With too few sentinels, every change is added, with a note. common: log
    of the anchor on each night. guards: log times of the sentinels.
    """
    import numpy as np

    def changes(logs: Array) -> list[Change]:
        present = np.flatnonzero(np.isfinite(logs))
        return _log_changes(one, [one.nights[i] for i in present], logs[present], 0.0)

    of_anchor = changes(common)
    quiet = anchor.anchor(guards, anchor.FEWEST_SENTINELS) if len(guards) else np.full(len(common), np.nan)
    excess = common - quiet
    if np.isfinite(excess).sum() < FEWEST:
        few = "no sentinel shows whether it is the machine: name Cells whose code does not change (--sentinel)"
        found.changes += [replace(change, note=few) for change in of_anchor]
        return
    of_code = changes(excess)
    found.changes += [replace(change, note="all series but the sentinels") for change in of_code]
    distance = found.history.distance
    found.machine += [c for c in of_anchor if all(distance(c.night, other.night) > NEAR for other in of_code)]


def _log_changes(
    one: HistorySeries, nights: Sequence[str], logs: Array, shared: float, noise: float | None = None
) -> list[Change]:
    """Return the changes in a series of log times. The levels of the returned changes are times, not logs.

    shared: noise of similar series. noise: noise of this series; if None, it is estimated.
    """
    least = math.log1p(TIMED_LEAST)
    steps = change_points.steps(logs, least=least, shared=shared, own=noise)
    changes = _changes(one, nights, steps, least)
    return [replace(c, before=math.exp(c.before), after=math.exp(c.after), worse=not c.worse) for c in changes]


def _changes(one: HistorySeries, nights: Sequence[str], steps: Sequence[LevelChange], least: float) -> list[Change]:
    """Return steps of a series as changes. A step to a lower value is marked as worse, as for an accuracy.

    least: the old level counts as back if a later level is less than this away from it.
    """
    found = []
    for number, step in enumerate(steps):
        # Nights on which a later change brings the level back to that before this change, or beyond.
        sign = math.copysign(1.0, step.change)
        back = (nights[s.at] for s in steps[number + 1 :] if sign * (s.after - step.before) < least)
        before, night = nights[step.at - 1], nights[step.at]
        worse, settled = step.change < 0, next(back, None)
        found.append(Change(one.cell, one.metric, one.place, before, night, step.before, step.after, worse, settled))
    return found


def _logs(series: Sequence[HistorySeries], nights: Sequence[str]) -> Array:
    """Return the log times as a float64 array of shape (series, nights). A missing time is NaN."""
    import numpy as np

    column = {night: i for i, night in enumerate(nights)}
    found = np.full((len(series), len(nights)), np.nan)
    for row, one in enumerate(series):
        values = np.array(one.values, dtype=float)
        values[values <= 0] = np.nan  # no clock measured this: the file was edited
        found[row, [column[night] for night in one.nights]] = np.log(values)
    return found
