"""The verb `history detect`: what changed, since when, what lies between, and who has confirmed it."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from harness.analysis import metrics, tracked_metrics
from harness.console import say
from harness.errors import Exit
from harness.regression.history import changes, decisions, missing_series, night_files
from harness.regression.history.cell_names import named, picked
from harness.regression.history.changes import Change, Seen
from harness.regression.history.confirmations import standing
from harness.regression.history.decisions import NEAR
from harness.regression.history.differences import between
from harness.regression.history.night_files import History, Line
from harness.regression.history.series import HistorySeries, series


def detect(
    folder: Path, cell: str | None, sentinel: str | None, as_json: bool, strict: bool, *, out: Any = say
) -> Exit:
    """Print what changed and return the exit code; see the help of the verb. Raises UsageError for what fits no Cell."""
    from harness.regression.history import table

    # A history is millions of small objects of which none is ever garbage: looking for it took half of the time.
    gc.disable()
    try:
        history = night_files.read(folder)
        found = document(history, only=picked(history, cell) if cell else None, sentinel=sentinel, strict=strict)
    finally:
        gc.enable()
    out(json.dumps(found, indent=1) if as_json else table.detected(found))
    return Exit(found["exit"])


def document(
    history: History, *, only: frozenset[str] | None = None, sentinel: str | None = None, strict: bool = False
) -> dict[str, Any]:
    """Return what was found as one document, ready for JSON. only: the Cells whose changes are told; all are looked at."""
    known = series(history)
    guards = picked(history, sentinel, "--sentinel") if sentinel else frozenset()
    seen = changes.changes(known, _quantization(history), guards)
    names = named(history)
    told = [one for one in judged(history, seen, names) if only is None or one["cell"] in only]
    # A suspicion that pairs confirmed stands as any change does; one that they refuted was none.
    candidates = [one for one in told if one["standing"] not in ("suspect", "unfounded")]
    stopped = [one for one in missing_series.stopped(history, names) if only is None or one["cell"] in only]
    ended = {one["cell"] for one in stopped}
    gone = [one for one in missing_series.gone(history, known, names, ended) if only is None or one["cell"] in only]
    return {
        "schema": night_files.SCHEMA,
        "nights": [night.night for night in history.nights],
        "series": len(known),
        "compared": seen.compared,
        "least": {
            "time": changes.TIMED_LEAST,
            "accuracy": changes.SCORE_LEAST,
            "peak_B": metrics.TRAINING_PEAK.slack_B,
        },
        "candidates": candidates,
        "suspects": [one for one in told if one["standing"] == "suspect"],
        "machine": [_plain(history, change, names) for change in seen.machine],
        "residue": list(_residue(history, known)),
        "unanchored": [{"place": on, "metric": family, "series": count} for on, family, count in seen.unanchored],
        "loose": [
            {"place": on, "metric": family, "nights": [history.nights[i].night for i in where]}
            for on, family, where in seen.loose
        ],
        "stopped": stopped,
        "gone": gone,
        "few_passes": _few_passes(history),
        "resets": list(history.resets),
        "left_out": dict(sorted(history.broken.items())),
        "exit": int(_exit(history, candidates, seen, strict, missing=bool(stopped or gone))),
    }


def judged(history: History, seen: Seen, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return every change, and what became of it, the open ones first."""
    told = [*seen.changes, *standing(history, seen.changes)]
    return [_candidate(history, change, names) for change in sorted(told, key=_order)]


def all_changes(history: History) -> list[dict[str, Any]]:
    """Return every change of every series, also those that were refuted."""
    seen = changes.changes(series(history), _quantization(history), frozenset())
    return judged(history, seen, named(history))


def _exit(
    history: History, candidates: Sequence[Mapping[str, Any]], seen: Seen, strict: bool, *, missing: bool
) -> Exit:
    open_ = [c for c in candidates if c["settled"] is None]
    if any(c["worse"] and c["standing"] in ("confirmed", "counted") for c in open_):
        return Exit.FAIL
    if missing:  # before `nothing to compare`: it may be why there is nothing
        return Exit.INFRASTRUCTURE
    if not seen.compared:
        return Exit.NOTHING_COMPARED
    if history.broken:
        return Exit.INFRASTRUCTURE
    return Exit.INCONCLUSIVE if strict and any(c["standing"] == "candidate" for c in open_) else Exit.PASS


def _order(change: Change) -> tuple[Any, ...]:
    """Open ones first, worse ones first, the newest first."""
    return (change.settled is not None, not change.worse, -change.nights[1], change.cell, change.metric, change.on)


def _plain(history: History, change: Change, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "cell": change.cell,
        "name": names.get(change.cell, change.cell),
        "metric": change.metric,
        "place": change.on,
        "night": history.nights[change.nights[1]].night,
        "before": change.before,
        "after": change.after,
        "change": change.change if math.isfinite(change.change) else None,
        "worse": change.worse,
        "settled": None if change.settled is None else history.nights[change.settled].night,
        "note": change.note,
    }


def _candidate(history: History, change: Change, names: Mapping[str, str]) -> dict[str, Any]:
    lies = between(history, change)
    said = _confirmation(history, change, lies.paired)
    told = _plain(history, change, names)
    word = "counted" if change.sure else "suspect" if change.young else "candidate"
    if said is not None and said["verdict"] == "refuted":
        word = "unfounded" if change.young else "refuted"
    elif said is not None:
        word, told["worse"] = "confirmed", said["verdict"] == "regressed"  # whatever the nights look like
    return told | {"standing": word, "confirmation": said, "between": asdict(lies)}


def _confirmation(history: History, change: Change, revisions: tuple[str, str]) -> Line | None:
    """Return the last word on a change; one on its very night before one on a night nearby.

    Pairs that found nothing say so of the revisions that they ran: of a change that came with a later one they say nothing.
    """
    index = {night.night: i for i, night in enumerate(history.nights)}
    words = ("regressed", "improved", "refuted")
    about = [
        (-abs(index[line["night"]] - change.nights[1]), str(line.get("made", "")), line)
        for line in history.confirmations
        if line["night"] in index
        and line.get("verdict") in words
        and (line["verdict"] != "refuted" or line.get("revisions", list(revisions))[1:] == [revisions[1]])
        and decisions.concerns(line, change.cell, change.metric)
    ]
    near = [(apart, made, line) for apart, made, line in about if -apart <= NEAR]
    return max(near, key=lambda one: one[:2])[2] if near else None


def _residue(history: History, known: Sequence[HistorySeries]) -> Iterator[dict[str, Any]]:
    """Yield each place that took over Cells from another: what differs, since when, of how many Cells, by which factor."""
    where: dict[str, dict[str, str]] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, night in enumerate(history.nights):
        for on in {row["on"] for row in night.rows}:
            where[on] = night.places[on]
            first.setdefault(on, index)
            last[on] = index
    steps: dict[str, dict[str, HistorySeries]] = {}
    cells: dict[str, set[str]] = {}
    for one in known:
        cells.setdefault(one.on, set()).add(one.cell)
        if one.metric == tracked_metrics.STEP:
            steps.setdefault(one.on, {})[one.cell] = one
    for on in sorted(cells, key=lambda on: (first[on], on)):
        same = [o for o in cells if first[o] < first[on] and where[o].get("device") == where[on].get("device")]
        before = max((o for o in same if cells[o] & cells[on]), key=lambda o: (last[o], o), default=None)
        if before is None:
            continue
        shared = cells[before] & cells[on]
        both = [i for i in shared if i in steps.get(before, {}) and i in steps.get(on, {})]
        ratios = [median(steps[on][i].values[:7]) / median(steps[before][i].values[-7:]) for i in both]
        yield {
            "night": history.nights[first[on]].night,
            "place": on,
            "instead_of": before,
            "changed": tracked_metrics.moved(where[before], where[on]),
            "cells": len(shared),
            "step_ratio": median(ratios) if ratios else None,
        }


def _few_passes(history: History) -> dict[str, int]:
    """Map each night on which a Cell had fewer than PASSES passes to the fewest that one had."""
    counts = {
        night.night: min(Counter(f"{row['cell']} {row['on']}" for row in night.rows).values(), default=0)
        for night in history.nights
    }
    return {night: fewest for night, fewest in counts.items() if fewest < night_files.PASSES}


def _quantization(history: History) -> dict[str, str]:
    found = {}
    for cell_id, cell in history.cells.items():
        base = cell.get("base")
        found[cell_id] = str(base.get("quantization", "")) if isinstance(base, dict) else ""
    return found
