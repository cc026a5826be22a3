"""`history detect`: find changes of level in a history, their states, and what else changed at the same time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from harness.analysis import tracked_metrics
from harness.console import print_json, print_lines
from harness.errors import Exit
from harness.regression import collector
from harness.regression.history import cell_names, changes, night_files
from harness.regression.history.changes import Change
from harness.regression.history.confirmations import confirmed_regressions
from harness.regression.history.differences import between
from harness.regression.history.findings import (
    Detection,
    JudgedChange,
    MissingSeries,
    PlaceChange,
    State,
    StoppedCell,
)
from harness.regression.history.missing_series import missing_series, stopped_cells
from harness.regression.history.night_files import NEAR, Decision, History
from harness.regression.history.series import HistorySeries, series


def detect(folder: Path, cell: str | None, sentinel: str | None, as_json: bool, strict: bool) -> Exit:
    """Print the changes of level in a history, and return the exit code that `history detect --help` describes.

    cell, sentinel: expressions in the syntax of `--only`. Raises UsageError if an expression selects no Cell.
    """
    from harness.regression.history import table

    with collector.paused():  # garbage collection would take half of the time
        history = night_files.read(folder)
        only = cell_names.select(history, cell) if cell else None
        found = detection(history, only=only, sentinel=sentinel, strict=strict)
    if as_json:
        print_json(found.document())
    else:
        print_lines(table.detection_lines(found))
    return found.exit


def detection(
    history: History, *, only: frozenset[str] | None = None, sentinel: str | None = None, strict: bool = False
) -> Detection:
    """Return all findings in a history.

    only: cell_ids to report; the times of a night are compared across all Cells in any case. sentinel: an expression
    that selects Cells whose code does not change. strict: if true, unconfirmed changes give the exit code INCONCLUSIVE.
    """
    known = series(history)
    sentinels = cell_names.select(history, sentinel, "--sentinel") if sentinel else frozenset()
    found = changes.find_changes(history, known, sentinels)
    names = cell_names.names(history)

    def reported(one: JudgedChange | StoppedCell | MissingSeries) -> bool:
        return only is None or one.cell in only

    judged = list(filter(reported, _judged(history, found.changes, names)))
    stopped = list(filter(reported, stopped_cells(history, names)))
    missing = missing_series(history, known, names, {one.cell for one in stopped})
    return Detection(
        nights=list(history.index), series=len(known), compared=found.compared,
        # A confirmed suspicion counts as a change; a refuted suspicion does not.
        candidates=[one for one in judged if one.standing not in ("suspect", "unfounded")],
        suspects=[one for one in judged if one.standing == "suspect"],
        machine=found.machine, residue=list(_place_changes(history, known)), unanchored=found.unanchored,
        loose=found.unjudged, stopped=stopped, gone=list(filter(reported, missing)), few_passes=_few_passes(history),
        resets=history.resets, left_out=dict(sorted(history.broken.items())), strict=strict,
    )  # fmt: skip


def all_changes(history: History) -> list[JudgedChange]:
    """Return every change of every series, found without sentinels, including refuted changes."""
    found = changes.find_changes(history, series(history), frozenset())
    return _judged(history, found.changes, cell_names.names(history))


def _judged(history: History, found: Sequence[Change], names: Mapping[str, str]) -> list[JudgedChange]:
    """Return every change with its state, the most important first.

    Lasting changes come before settled ones, then worse before better, then new before old.
    """

    def order(c: Change) -> tuple[Any, ...]:
        return (c.settled is not None, not c.worse, -history.index[c.night], c.cell, c.metric, c.place)

    every = sorted([*found, *confirmed_regressions(history, found)], key=order)
    return [_judge(history, change, names.get(change.cell, change.cell)) for change in every]


def _judge(history: History, change: Change, name: str) -> JudgedChange:
    differences = between(history, change)
    state: State = "counted" if change.counted else "suspect" if change.recent else "candidate"
    confirmation = _confirmation(history, change, differences.paired)
    if confirmation is not None and confirmation.verdict == "refuted":
        state = "unfounded" if change.recent else "refuted"
    elif confirmation is not None:
        state = "confirmed"
        change = replace(change, worse=confirmation.verdict == "regressed")  # a verdict outweighs the nights
    return JudgedChange(**vars(change), name=name, standing=state, confirmation=confirmation, between=differences)


def _confirmation(history: History, change: Change, revisions: tuple[str, str]) -> Decision | None:
    """Return the stored verdict that applies to a change, or None.

    A verdict on the same night is preferred to a verdict on a night nearby, and then a later verdict to an earlier one.
    If pairs of runs gave the verdict `refuted`, it applies only to the new revision that they ran, not to a change that
    came with a later revision.
    """
    near = [
        line
        for line in history.confirmations
        if line.applies(change.cell, change.metric)
        and history.distance(line.night, change.night) <= NEAR
        and line.verdict in ("regressed", "improved", "refuted")
        and (line.verdict != "refuted" or line.revisions is None or line.revisions[1:] == [revisions[1]])
    ]
    return max(near, key=lambda line: (-history.distance(line.night, change.night), line.made or ""), default=None)


def _place_changes(history: History, known: Iterable[HistorySeries]) -> Iterator[PlaceChange]:
    """Yield each place (machine and software) that took over Cells from an earlier place."""
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    facts: dict[str, dict[str, str]] = {}
    for night in history.nights:
        for place in {row["on"] for row in night.rows}:
            first.setdefault(place, night.night)
            last[place], facts[place] = night.night, night.places[place]
    cells: dict[str, set[str]] = {}
    steps: dict[tuple[str, str], list[float]] = {}
    for one in known:
        cells.setdefault(one.place, set()).add(one.cell)
        if one.metric == tracked_metrics.STEP:
            steps[one.place, one.cell] = one.values
    for place in sorted(cells, key=lambda place: (first[place], place)):
        earlier = [
            other for other in cells
            if first[other] < first[place] and facts[other].get("device") == facts[place].get("device")
            and cells[other] & cells[place]
        ]  # fmt: skip
        if not earlier:
            continue
        before = max(earlier, key=lambda other: (last[other], other))
        shared = cells[before] & cells[place]
        both = [cell for cell in shared if (before, cell) in steps and (place, cell) in steps]
        ratios = [median(steps[place, cell][:7]) / median(steps[before, cell][-7:]) for cell in both]
        changed = tracked_metrics.place_changes(facts[before], facts[place])
        ratio = median(ratios) if ratios else None
        yield PlaceChange(first[place], place, before, changed, len(shared), ratio)


def _few_passes(history: History) -> dict[str, int]:
    """Return date -> fewest runs of a Cell on that night, for each night on which a Cell ran less than PASSES times."""
    counts = {
        night.night: min(Counter(f"{row['cell']} {row['on']}" for row in night.rows).values(), default=0)
        for night in history.nights
    }
    return {night: fewest for night, fewest in counts.items() if fewest < night_files.PASSES}
