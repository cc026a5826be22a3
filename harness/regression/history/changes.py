"""Every change of level in a history: of times beside their anchor, of the anchor itself, of bytes and of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from harness.analysis import tracked_metrics
from harness.analysis.statistics import anchor, change_points
from harness.analysis.statistics.change_points import FEWEST, LevelChange
from harness.regression.history.decisions import EVERY, NEAR
from harness.regression.history.series import HistorySeries

if TYPE_CHECKING:
    from harness.analysis.statistics.change_points import Array

TIMED_LEAST = 0.02
"""A time must change by so much to be told: what pairs of runs can still confirm at a bearable price."""
SCORE_LEAST = 0.01
"""An accuracy, by one point."""
_SCORE_FLOOR = SCORE_LEAST / 5

Unit = Literal["share", "points", "bytes"]


@dataclass(frozen=True)
class Change:
    """A change of level. cell: `*` for what all series of a place have in common. nights: indices, the last of the old level
    and the first of the new one. before, after: the levels, in the metric's unit (times beside their anchor; the anchor
    itself as a ratio). settled: the night on which the level came back, if it did. sure: counted, so there is nothing to
    confirm. young: the new level has lasted one or two nights, so it is a suspicion.
    """

    cell: str
    metric: str
    on: str
    nights: tuple[int, int]
    before: float
    after: float
    worse: bool
    settled: int | None = None
    sure: bool = False
    young: bool = False
    note: str = ""

    @property
    def points(self) -> bool:
        """Whether the change is told in points: of a score."""
        return tracked_metrics.kind(self.metric) == "score"

    @property
    def change(self) -> float:
        """The difference of a score; of all else the ratio of the levels, less 1 (of nothing before, infinity)."""
        if self.points:
            return self.after - self.before
        return self.after / self.before - 1 if self.before else math.inf


@dataclass
class Seen:
    """What was found. compared: series long enough to show a change. machine: the anchor's own changes that the sentinels
    share. unanchored: places and families without an anchor, with how many series they have. loose: places, families and
    those of their nights that have none, so that their times are not judged. last: the history's last night; only a level
    that is there is young.
    """

    changes: list[Change] = field(default_factory=list)
    machine: list[Change] = field(default_factory=list)
    unanchored: list[tuple[str, str, int]] = field(default_factory=list)
    loose: list[tuple[str, str, list[int]]] = field(default_factory=list)
    compared: int = 0
    last: int = 0


def changes(series: Sequence[HistorySeries], quantization: Mapping[str, str], sentinels: frozenset[str]) -> Seen:
    """Find the changes of all series.

    quantization: of each Cell's base. sentinels: cell_ids whose times only watch the machine, beside those of the bare base
    models; neither is a candidate itself.
    """
    seen = Seen(last=max((night for one in series for night in one.nights), default=0))
    for one in series:
        if tracked_metrics.kind(one.metric) in ("counted", "peak"):
            seen.compared += len(one.nights) > 1
            seen.changes += _counted(one)
    scores = [one for one in series if tracked_metrics.kind(one.metric) == "score" and len(one.nights) >= FEWEST]
    if scores:
        _scores(scores, seen)
    timed = [one for one in series if tracked_metrics.kind(one.metric) == "timed"]
    for place in sorted({one.on for one in timed}):
        here = [one for one in timed if one.on == place]
        guards = [one for one in here if one.cell in sentinels or _of_base(one, quantization)]
        watching = {id(one) for one in guards}
        judged = [one for one in here if id(one) not in watching]
        for family in sorted({one.metric.partition("/")[0] for one in judged}):
            _timed(family, [one for one in judged if one.metric.partition("/")[0] == family], guards, seen)
    return seen


def _of_base(one: HistorySeries, quantization: Mapping[str, str]) -> bool:
    return tracked_metrics.sentinel(one.metric, quantization.get(one.cell, ""))


def _counted(one: HistorySeries) -> Iterator[Change]:
    """Yield a change on the first night on which bytes or parameters are not those of the level before."""
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
    for place, (last, (_, old), (night, new)) in enumerate(zip(before, levels, levels[1:], strict=False)):
        worse = tracked_metrics.got_worse(one.metric, old, new)
        allowed, counted = tracked_metrics.slack(one.metric, old), tracked_metrics.kind(one.metric) == "counted"
        back = (n for n, later in levels[place + 2 :] if (later <= old + allowed if new > old else later == old))
        yield Change(
            one.cell, one.metric, one.on, (last, night), old, new, worse, next(back, None), sure=counted
        )  # fmt: skip


def _scores(scores: Sequence[HistorySeries], seen: Seen) -> None:
    import numpy as np

    values = [np.array(one.values, dtype=float) for one in scores]
    shared = float(np.median([change_points.noise(v) for v in values]))
    for one, v in zip(scores, values, strict=True):
        seen.compared += 1
        found = change_points.steps(v, least=SCORE_LEAST, shared=shared, floor=_SCORE_FLOOR)
        for place, step in enumerate(found):
            back = _back(found[place + 1 :], step, SCORE_LEAST)
            seen.changes.append(_change(one, one.nights, step, step.before, step.after, step.change < 0, back))


def _timed(family: str, judged: Sequence[HistorySeries], guards: Sequence[HistorySeries], seen: Seen) -> None:
    """Judge the times of one family at one place: each beside the anchor, then the anchor beside the sentinels."""
    import numpy as np

    on = judged[0].on
    nights = sorted({night for one in (*judged, *guards) for night in one.nights})
    logs = _logs(judged, nights)
    common = anchor.anchor(logs)
    if not np.isfinite(common).any():
        seen.unanchored.append((on, family, len(judged)))
        beside = logs
    else:
        beside = logs - common
        if loose := [night for night, found in zip(nights, common, strict=True) if math.isnan(found)]:
            seen.loose.append((on, family, loose))
    rows = [(one, np.flatnonzero(np.isfinite(row)), row) for one, row in zip(judged, beside, strict=True)]
    rows = [(one, there, row[there]) for one, there, row in rows if len(there) >= FEWEST]
    noises = [change_points.noise(row) for _, _, row in rows]
    shared = float(np.median(noises)) if rows else 0.0
    for (one, there, row), noise in zip(rows, noises, strict=True):
        seen.compared += 1
        own = nights if len(there) == len(nights) else [nights[i] for i in there]
        found = _steps(one, own, row, shared, noise)
        seen.changes += found
        if own[-1] == seen.last:
            since = own.index(found[-1].nights[1]) if found else 0
            seen.changes += _suspicion(one, own, row, shared, noise, since)
    _anchor(HistorySeries(EVERY, family, on, nights, [], []), common, _logs(guards, nights), seen)


def _anchor(one: HistorySeries, common: Array, guards: Array, seen: Seen) -> None:
    """Watch what was divided away: is it the machine, whose sentinels change too, or what is under test?"""
    import numpy as np

    there = np.isfinite(common)
    moves = _steps(one, [one.nights[i] for i in np.flatnonzero(there)], common[there], 0.0)
    quiet = anchor.anchor(guards, anchor.FEWEST_SENTINELS) if len(guards) else np.full(len(common), np.nan)
    both = there & np.isfinite(quiet)
    if both.sum() < FEWEST:
        few = "no sentinel tells whether it is the machine: name Cells that nobody changes (--sentinel)"
        seen.changes += [_noted(move, few) for move in moves]
        return
    apart = common - quiet
    own = _steps(one, [one.nights[i] for i in np.flatnonzero(both)], apart[both], 0.0)
    seen.changes += [_noted(move, "all series but the sentinels") for move in own]
    seen.machine += [move for move in moves if all(abs(move.nights[1] - o.nights[1]) > NEAR for o in own)]


def _steps(
    one: HistorySeries, nights: Sequence[int], logs: Array, shared: float, noise: float | None = None
) -> list[Change]:
    least = math.log1p(TIMED_LEAST)
    found = change_points.steps(logs, least=least, shared=shared, own=noise)
    return [
        _change(
            one, nights, step, math.exp(step.before), math.exp(step.after), step.change > 0,
            _back(found[place + 1 :], step, least),
        )
        for place, step in enumerate(found)
    ]  # fmt: skip


def _suspicion(
    one: HistorySeries, nights: Sequence[int], logs: Array, shared: float, noise: float, since: int
) -> list[Change]:
    step = change_points.suspect(logs, since=since, least=math.log1p(TIMED_LEAST), shared=shared, own=noise)
    if step is None:
        return []
    edge = (nights[step.at - 1], nights[-1])
    return [Change(one.cell, one.metric, one.on, edge, math.exp(step.before), math.exp(step.after), True, young=True)]


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
    return Change(one.cell, one.metric, one.on, edge, before, after, worse, settled)


def _back(later: Sequence[LevelChange], step: LevelChange, least: float) -> LevelChange | None:
    """Return the first later change after which the level is where it was before `step`, or beyond."""
    way = math.copysign(1.0, step.change)
    return next((after for after in later if way * (after.after - step.before) < least), None)


def _noted(change: Change, note: str) -> Change:
    return Change(**{**vars(change), "note": note})


def _logs(series: Sequence[HistorySeries], nights: Sequence[int]) -> Array:
    """Return log times of shape (series, nights), NaN where there is none."""
    import numpy as np

    place = {night: i for i, night in enumerate(nights)}
    found = np.full((len(series), len(nights)), np.nan)
    for row, one in enumerate(series):
        values = np.array(one.values, dtype=float)
        values[values <= 0] = np.nan  # no clock has said so: somebody's hand has
        found[row, [place[night] for night in one.nights]] = np.log(values)
    return found
