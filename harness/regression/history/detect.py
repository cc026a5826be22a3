"""`history detect`: find changes of level, their state and the differences between their nights."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from harness.analysis import tracked_metrics
from harness.console import echo
from harness.errors import Exit
from harness.regression.history import cell_names, changes, decisions, night_files
from harness.regression.history.changes import Change, FoundChanges
from harness.regression.history.confirmations import confirmed_regressions
from harness.regression.history.decisions import NEAR
from harness.regression.history.differences import between
from harness.regression.history.findings import (
    Detection,
    JudgedChange,
    PlaceChange,
    ShownChange,
    Standing,
    Unanchored,
    Unjudged,
)  # fmt: skip
from harness.regression.history.missing_series import missing_series, stopped_cells
from harness.regression.history.night_files import Decision, History
from harness.regression.history.series import HistorySeries, series


def detect(
    folder: Path, cell: str | None, sentinel: str | None, as_json: bool, strict: bool, *, out: Callable[[str], Any] = echo
) -> Exit:  # fmt: skip
    """Print the changes and return the exit code; see the help of the command.

    cell, sentinel: expressions, as for `--only`. Raises UsageError for one that selects no Cell.
    """
    from harness.regression.history import table

    # A history has millions of small objects, none of them garbage: the collector took half of the time.
    gc.disable()
    try:
        history = night_files.read(folder)
        only = cell_names.select(history, cell) if cell else None
        found = detection(history, only=only, sentinel=sentinel, strict=strict)
    finally:
        gc.enable()
    out(json.dumps(found.document(), indent=1) if as_json else table.detection_text(found))
    return found.exit


def detection(
    history: History, *, only: frozenset[str] | None = None, sentinel: str | None = None, strict: bool = False
) -> Detection:
    """Return all findings in a history. only: the Cells to report; all Cells are used for the anchors."""
    known = series(history)
    sentinels = cell_names.select(history, sentinel, "--sentinel") if sentinel else frozenset()
    found = changes.find_changes(known, _quantization(history), sentinels)
    names = cell_names.names(history)
    judged = [one for one in judge(history, found, names) if only is None or one.cell in only]
    # A confirmed suspicion counts as a change, a refuted one does not.
    candidates = [one for one in judged if one.standing not in ("suspect", "unfounded")]
    stopped = [one for one in stopped_cells(history, names) if only is None or one.cell in only]
    missing = missing_series(history, known, names, {one.cell for one in stopped})
    gone = [one for one in missing if only is None or one.cell in only]
    nights = [night.night for night in history.nights]
    return Detection(
        nights=nights,
        series=len(known),
        compared=found.compared,
        candidates=candidates,
        suspects=[one for one in judged if one.standing == "suspect"],
        machine=[_shown(history, change, names) for change in found.machine],
        residue=list(_place_changes(history, known)),
        unanchored=[Unanchored(place, family, count) for place, family, count in found.unanchored],
        loose=[Unjudged(place, family, [nights[i] for i in where]) for place, family, where in found.loose],
        stopped=stopped,
        gone=gone,
        few_passes=_few_passes(history),
        resets=history.resets,
        left_out=dict(sorted(history.broken.items())),
        exit=_exit(history, candidates, found, strict, missing=bool(stopped or gone)),
    )


def judge(history: History, found: FoundChanges, names: Mapping[str, str]) -> list[JudgedChange]:
    """Return every change with its state, the open ones first."""
    every = [*found.changes, *confirmed_regressions(history, found.changes)]
    return [_judged(history, change, names) for change in sorted(every, key=_order)]


def all_changes(history: History) -> list[JudgedChange]:
    """Return every change of every series, refuted ones included."""
    found = changes.find_changes(series(history), _quantization(history), frozenset())
    return judge(history, found, cell_names.names(history))


def _exit(
    history: History, candidates: Sequence[JudgedChange], found: FoundChanges, strict: bool, *, missing: bool
) -> Exit:
    unsettled = [c for c in candidates if c.settled is None]
    if any(c.worse and c.standing in ("confirmed", "counted") for c in unsettled):
        return Exit.FAIL
    if missing:  # takes precedence over NOTHING_COMPARED: it may be the cause
        return Exit.INFRASTRUCTURE
    if not found.compared:
        return Exit.NOTHING_COMPARED
    if history.broken:
        return Exit.INFRASTRUCTURE
    return Exit.INCONCLUSIVE if strict and any(c.standing == "candidate" for c in unsettled) else Exit.PASS


def _order(change: Change) -> tuple[bool, bool, int, str, str, str]:
    """Sort open ones first, then worse ones, then the newest."""
    return (change.settled is not None, not change.worse, -change.nights[1], change.cell, change.metric, change.place)


def _shown(history: History, change: Change, names: Mapping[str, str]) -> ShownChange:
    return ShownChange(**_fields(history, change, names))


def _fields(history: History, change: Change, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "cell": change.cell,
        "name": names.get(change.cell, change.cell),
        "metric": change.metric,
        "place": change.place,
        "night": history.nights[change.nights[1]].night,
        "before": change.before,
        "after": change.after,
        "change": change.change if math.isfinite(change.change) else None,
        "worse": change.worse,
        "settled": None if change.settled is None else history.nights[change.settled].night,
        "note": change.note,
    }


def _judged(history: History, change: Change, names: Mapping[str, str]) -> JudgedChange:
    differences = between(history, change)
    confirmation = _confirmation(history, change, differences.paired)
    fields = _fields(history, change, names)
    standing: Standing = "counted" if change.sure else "suspect" if change.young else "candidate"
    if confirmation is not None and confirmation.get("verdict") == "refuted":
        standing = "unfounded" if change.young else "refuted"
    elif confirmation is not None:
        standing = "confirmed"
        fields["worse"] = confirmation.get("verdict") == "regressed"  # independent of the nights
    return JudgedChange(**fields, standing=standing, confirmation=confirmation, between=differences)


def _confirmation(history: History, change: Change, revisions: tuple[str, str]) -> Decision | None:
    """Return the last verdict on a change; one on its own night goes before one on a night nearby.

    `refuted` applies only to the revisions that were compared, not to a change that came with a later revision.
    """
    index = {night.night: i for i, night in enumerate(history.nights)}
    about = [
        (-abs(index[line["night"]] - change.nights[1]), str(line.get("made", "")), line)
        for line in history.confirmations
        if line["night"] in index
        and line.get("verdict") in ("regressed", "improved", "refuted")
        and (line.get("verdict") != "refuted" or line.get("revisions", list(revisions))[1:] == [revisions[1]])
        and decisions.applies(line, change.cell, change.metric)
    ]
    near = [one for one in about if -one[0] <= NEAR]
    return max(near, key=lambda one: one[:2])[2] if near else None


def _place_changes(history: History, known: Sequence[HistorySeries]) -> Iterator[PlaceChange]:
    """Yield each place that took over Cells from another one."""
    where: dict[str, dict[str, str]] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, night in enumerate(history.nights):
        for place in {row["on"] for row in night.rows}:
            where[place] = night.places[place]
            first.setdefault(place, index)
            last[place] = index
    steps: dict[str, dict[str, HistorySeries]] = {}
    cells: dict[str, set[str]] = {}
    for one in known:
        cells.setdefault(one.place, set()).add(one.cell)
        if one.metric == tracked_metrics.STEP:
            steps.setdefault(one.place, {})[one.cell] = one
    for place in sorted(cells, key=lambda place: (first[place], place)):
        same_device = [
            o for o in cells
            if first[o] < first[place] and where[o].get("device") == where[place].get("device") and cells[o] & cells[place]
        ]  # fmt: skip
        before = max(same_device, key=lambda o: (last[o], o), default=None)
        if before is None:
            continue
        shared = cells[before] & cells[place]
        both = [i for i in shared if i in steps.get(before, {}) and i in steps.get(place, {})]
        ratios = [median(steps[place][i].values[:7]) / median(steps[before][i].values[-7:]) for i in both]
        yield PlaceChange(
            history.nights[first[place]].night, place, before, tracked_metrics.place_changes(where[before], where[place]),
            len(shared), median(ratios) if ratios else None,
        )  # fmt: skip


def _few_passes(history: History) -> dict[str, int]:
    """Return the nights on which a Cell had fewer than PASSES passes, with the smallest number."""
    counts = {
        night.night: min(Counter(f"{row['cell']} {row['on']}" for row in night.rows).values(), default=0)
        for night in history.nights
    }
    return {night: fewest for night, fewest in counts.items() if fewest < night_files.PASSES}


def _quantization(history: History) -> dict[str, str]:
    """Return the quantisation of each Cell's base, by cell_id."""
    found = {}
    for cell_id, cell in history.cells.items():
        base = cell.get("base")
        found[cell_id] = str(base.get("quantization", "")) if isinstance(base, dict) else ""
    return found
