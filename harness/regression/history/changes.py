"""Changes of level in a history: of times relative to their anchor, of the anchor, of bytes and of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from harness.analysis import tracked_metrics
from harness.analysis.statistics import anchor, change_points
from harness.analysis.statistics.change_points import FEWEST, LevelChange
from harness.regression.history.decisions import EVERY, NEAR
from harness.regression.history.series import HistorySeries

if TYPE_CHECKING:
    from harness.analysis.statistics.change_points import Array

TIMED_LEAST = 0.02
"""Smallest change of a time that counts; pairs of runs can still confirm it at a reasonable cost."""
SCORE_LEAST = 0.01
"""Smallest change of an accuracy that counts: one percentage point."""
_SCORE_FLOOR = SCORE_LEAST / 5


@dataclass(frozen=True)
class Change:
    """A change of level."""

    cell: str
    """A cell_id, or `*` for the common part of all series of a place."""
    metric: str
    place: str
    nights: tuple[int, int]
    """Indices of the last night of the old level and of the first night of the new one."""
    before: float
    """Old level, in the unit of the metric; times are relative to their anchor, the anchor is a ratio."""
    after: float
    """New level."""
    worse: bool
    settled: int | None = None
    """Index of the night on which the old level came back."""
    sure: bool = False
    """Counted, so that there is nothing to confirm."""
    young: bool = False
    """The new level has lasted one or two nights, so that it is only a suspicion."""
    note: str = ""

    @property
    def change(self) -> float:
        """The difference of a score; of other metrics after / before - 1, infinity if `before` is 0."""
        if tracked_metrics.kind(self.metric) == "score":
            return self.after - self.before
        return self.after / self.before - 1 if self.before else math.inf


@dataclass
class FoundChanges:
    """Changes of all series, and limits of the search."""

    changes: list[Change] = field(default_factory=list)
    machine: list[Change] = field(default_factory=list)
    """Changes of an anchor that the sentinels share."""
    unanchored: list[tuple[str, str, int]] = field(default_factory=list)
    """Place, family of metrics and number of series, where these are too few for an anchor."""
    loose: list[tuple[str, str, list[int]]] = field(default_factory=list)
    """Place, family of metrics and those nights that have no anchor, so that their times are not judged."""
    compared: int = 0
    """Number of series that are long enough to show a change."""
    last: int = 0
    """Last night of the history; only a level that reaches it can be young."""


def find_changes(
    series: Sequence[HistorySeries], quantization: Mapping[str, str], sentinels: frozenset[str]
) -> FoundChanges:
    """Find the changes of all series.

    quantization: of the base, by cell_id. sentinels: cell_ids. Their times, and those of the bare base models, only show
    changes of the machine, and are never reported as changes.
    """
    found = FoundChanges(last=max((night for one in series for night in one.nights), default=0))
    for one in series:
        if tracked_metrics.kind(one.metric) in ("counted", "peak"):
            found.compared += len(one.nights) > 1
            found.changes += _counted(one)
    scores = [one for one in series if tracked_metrics.kind(one.metric) == "score" and len(one.nights) >= FEWEST]
    if scores:
        _scores(scores, found)
    timed = [one for one in series if tracked_metrics.kind(one.metric) == "timed"]
    for place in sorted({one.place for one in timed}):
        here = [one for one in timed if one.place == place]
        guards = [one for one in here if one.cell in sentinels or _of_base(one, quantization)]
        watching = {id(one) for one in guards}
        judged = [one for one in here if id(one) not in watching]
        for family in sorted({one.metric.partition("/")[0] for one in judged}):
            _timed(family, [one for one in judged if one.metric.partition("/")[0] == family], guards, found)
    return found


def _of_base(one: HistorySeries, quantization: Mapping[str, str]) -> bool:
    return tracked_metrics.sentinel(one.metric, quantization.get(one.cell, ""))


def _counted(one: HistorySeries) -> Iterator[Change]:
    """Yield a change on the first night on which bytes or parameters differ from the level before."""
    if min(one.values) == max(one.values):
        return
    level, last = one.values[0], one.nights[0]
    levels = [(last, level)]
    before = []
    for night, value in zip(one.nights[1:], one.values[1:], strict=True):
        if abs(value - level) > tracked_metrics.slack(one.metric, level):
            levels.append((night, value))
            before.append(last)
            level = value
        last = night
    for number, (last, (_, old), (night, new)) in enumerate(zip(before, levels, levels[1:], strict=False)):
        worse = tracked_metrics.got_worse(one.metric, old, new)
        allowed, counted = tracked_metrics.slack(one.metric, old), tracked_metrics.kind(one.metric) == "counted"
        back = (n for n, later in levels[number + 2 :] if (later <= old + allowed if new > old else later == old))
        yield Change(
            one.cell, one.metric, one.place, (last, night), old, new, worse, next(back, None), sure=counted
        )  # fmt: skip


def _scores(scores: Sequence[HistorySeries], found: FoundChanges) -> None:
    import numpy as np

    values = [np.array(one.values, dtype=float) for one in scores]
    shared = float(np.median([change_points.noise(v) for v in values]))
    for one, v in zip(scores, values, strict=True):
        found.compared += 1
        steps = change_points.steps(v, least=SCORE_LEAST, shared=shared, floor=_SCORE_FLOOR)
        for number, step in enumerate(steps):
            back = _back(steps[number + 1 :], step, SCORE_LEAST)
            found.changes.append(_change(one, one.nights, step, step.before, step.after, step.change < 0, back))


def _timed(family: str, judged: Sequence[HistorySeries], guards: Sequence[HistorySeries], found: FoundChanges) -> None:
    """Judge the times of one family at one place, relative to the anchor; then the anchor, relative to the sentinels."""
    import numpy as np

    place = judged[0].place
    nights = sorted({night for one in (*judged, *guards) for night in one.nights})
    logs = _logs(judged, nights)
    common = anchor.anchor(logs)
    if not np.isfinite(common).any():
        found.unanchored.append((place, family, len(judged)))
        relative = logs
    else:
        relative = logs - common
        if loose := [night for night, value in zip(nights, common, strict=True) if math.isnan(value)]:
            found.loose.append((place, family, loose))
    rows = [(one, np.flatnonzero(np.isfinite(row)), row) for one, row in zip(judged, relative, strict=True)]
    rows = [(one, there, row[there]) for one, there, row in rows if len(there) >= FEWEST]
    noises = [change_points.noise(row) for _, _, row in rows]
    shared = float(np.median(noises)) if rows else 0.0
    for (one, there, row), noise in zip(rows, noises, strict=True):
        found.compared += 1
        own = nights if len(there) == len(nights) else [nights[i] for i in there]
        steps = _steps(one, own, row, shared, noise)
        found.changes += steps
        if own[-1] == found.last:
            since = own.index(steps[-1].nights[1]) if steps else 0
            found.changes += _suspicion(one, own, row, shared, noise, since)
    _anchor(HistorySeries(EVERY, family, place, nights, [], []), common, _logs(guards, nights), found)


def _anchor(one: HistorySeries, common: Array, guards: Array, found: FoundChanges) -> None:
    """Judge the anchor: if the sentinels change too, the machine has changed, otherwise the code under test."""
    import numpy as np

    there = np.isfinite(common)
    moves = _steps(one, [one.nights[i] for i in np.flatnonzero(there)], common[there], 0.0)
    quiet = anchor.anchor(guards, anchor.FEWEST_SENTINELS) if len(guards) else np.full(len(common), np.nan)
    both = there & np.isfinite(quiet)
    if both.sum() < FEWEST:
        few = "no sentinel shows whether it is the machine: name Cells whose code does not change (--sentinel)"
        found.changes += [_noted(move, few) for move in moves]
        return
    excess = common - quiet
    own = _steps(one, [one.nights[i] for i in np.flatnonzero(both)], excess[both], 0.0)
    found.changes += [_noted(move, "all series but the sentinels") for move in own]
    found.machine += [move for move in moves if all(abs(move.nights[1] - o.nights[1]) > NEAR for o in own)]


def _steps(
    one: HistorySeries, nights: Sequence[int], logs: Array, shared: float, noise: float | None = None
) -> list[Change]:
    least = math.log1p(TIMED_LEAST)
    found = change_points.steps(logs, least=least, shared=shared, own=noise)
    return [
        _change(
            one, nights, step, math.exp(step.before), math.exp(step.after), step.change > 0,
            _back(found[number + 1 :], step, least),
        )
        for number, step in enumerate(found)
    ]  # fmt: skip


def _suspicion(
    one: HistorySeries, nights: Sequence[int], logs: Array, shared: float, noise: float, since: int
) -> list[Change]:
    step = change_points.suspect(logs, since=since, least=math.log1p(TIMED_LEAST), shared=shared, own=noise)
    if step is None:
        return []
    edge = (nights[step.at - 1], nights[-1])
    return [
        Change(one.cell, one.metric, one.place, edge, math.exp(step.before), math.exp(step.after), True, young=True)
    ]


def _change(
    one: HistorySeries,
    nights: Sequence[int],
    step: LevelChange,
    before: float,
    after: float,
    worse: bool,
    back: LevelChange | None,
) -> Change:
    settled = nights[back.at] if back else None
    edge = (nights[step.at - 1], nights[step.at])
    return Change(one.cell, one.metric, one.place, edge, before, after, worse, settled)


def _back(later: Sequence[LevelChange], step: LevelChange, least: float) -> LevelChange | None:
    """Return the first later change that brings the level back to that before `step`, or beyond."""
    sign = math.copysign(1.0, step.change)
    return next((after for after in later if sign * (after.after - step.before) < least), None)


def _noted(change: Change, note: str) -> Change:
    return replace(change, note=note)


def _logs(series: Sequence[HistorySeries], nights: Sequence[int]) -> Array:
    """Return log times of shape (series, nights), float64; NaN where missing."""
    import numpy as np

    column = {night: i for i, night in enumerate(nights)}
    found = np.full((len(series), len(nights)), np.nan)
    for row, one in enumerate(series):
        values = np.array(one.values, dtype=float)
        values[values <= 0] = np.nan  # not measured by a clock: the file was edited
        found[row, [column[night] for night in one.nights]] = np.log(values)
    return found
