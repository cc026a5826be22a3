"""What `plan` prints: the Cells of a suite, and what the newest Record of each says about time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import store
from harness.analysis import naming
from harness.errors import StoreError
from harness.expand import Plan
from harness.listing import aligned
from harness.records import SCHEMA, Record, Status
from harness.report.display import mebibytes, seconds
from harness.suites import Suite


def planning(suite: Suite, plan: Plan, runs: Path = store.RUNS) -> dict[str, Any]:
    """Return the plan as one document, ready for JSON.

    Nothing is guessed: a Cell without a finished Record in `runs` has no estimate.
    """
    named = naming.full(plan.cells)
    newest = _newest({cell.cell_id for cell in plan.cells}, runs)
    cells: list[dict[str, Any]] = [
        {
            "cell_id": cell.cell_id,
            "id": plan.ids[cell.cell_id],
            "label": cell.label,
            "name": named[cell.cell_id],
            "cell": cell.model_dump(mode="json"),
            "last": _last(newest.get(cell.cell_id)),
        }
        for cell in plan.cells
    ]
    known = [c["last"] for c in cells if c["last"] is not None and c["last"]["status"] == Status.OK]
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "title": suite.title,
        "path": str(suite.path),
        "sha256": suite.sha256,
        "cells": cells,
        "comparisons": [c.model_dump(mode="json") for c in plan.comparisons],
        "estimate": {
            "cells": len(known),
            "of": len(cells),
            "seconds": sum(last["duration_s"] for last in known) if known else None,
            "peak_memory_B": max((last["peak_memory_B"] or 0 for last in known), default=None),
        },
    }


def as_text(document: Mapping[str, Any]) -> str:
    """Lay the document of `planning` out for people."""
    rows = [[c["cell_id"], c["id"], c["name"], _said(c["last"])] for c in document["cells"]]
    questions = [f"  {c['kind']}: {c['says']}" for c in document["comparisons"]]
    return "\n".join(
        [
            f"{document['suite']}: {document['title']}",
            *aligned(rows),
            *(["asks:", *questions] if questions else []),
            _summary(document["estimate"]),
        ]
    )


def _newest(wanted: set[str], runs: Path) -> dict[str, Record]:
    files = [path for path in runs.glob("*/cells/*.json") if path.name.partition(".")[0] in wanted]
    newest: dict[str, Record] = {}
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        cell_id = path.name.partition(".")[0]
        if cell_id not in newest:
            try:
                newest[cell_id] = store.read_record(path)
            except StoreError:
                continue  # torn: an older one will do; `report` is the place that shows it
    return newest


def _last(record: Record | None) -> dict[str, Any] | None:
    if record is None:
        return None
    peaks = [phase.peak_memory_B for phase in record.phases if phase.peak_memory_B is not None]
    return {
        "record": record.id,
        "run": record.run,
        "status": record.status.value,
        "duration_s": record.duration_s,
        "peak_memory_B": max(peaks, default=None),
    }


def _said(last: Mapping[str, Any] | None) -> str:
    if last is None:
        return "no estimate without a finished run here"
    if last["status"] != Status.OK:
        return f"last run ended as {last['status']} after {seconds(last['duration_s'])}"
    peak = last["peak_memory_B"]
    memory = f", peak {mebibytes(peak)} MiB" if peak is not None else ""
    return f"last run took {seconds(last['duration_s'])}{memory}"


def _summary(estimate: Mapping[str, Any]) -> str:
    count, known = estimate["of"], estimate["cells"]
    cells = f"{count} Cell{'s' if count != 1 else ''}"
    if not known:
        return f"{cells}; no estimate of time and memory without a finished run here"
    rest = f"; no estimate for the other {count - known}" if known < count else ""
    peak = f", peak {mebibytes(estimate['peak_memory_B'])} MiB" if estimate["peak_memory_B"] else ""
    return f"{cells}; {known} took {seconds(estimate['seconds'])} last time{peak}{rest}"
