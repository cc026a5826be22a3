"""The plan of a suite as a document and as text: its Cells, their predicted memory and their newest Records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.assets.table import resolve
from harness.console import align_columns
from harness.errors import StoreError, plural
from harness.memory_model import plan_prediction
from harness.records import naming, store
from harness.records.record import SCHEMA, Predicted, Record, Status
from harness.report.formatting import mebibytes, seconds
from harness.suites.expand import Plan
from harness.suites.suite import Suite


def predictions(suite: Suite, plan: Plan) -> dict[str, Predicted | str]:
    """Predict the memory of every Cell of the plan from its model's shape, in one child process; see `footprint.cells`."""
    base = suite.path.resolve().parent
    sources = {cell.model: resolve(cell.model, suite.sources, base) for cell in plan.cells}
    labels = {name: task.labels for name, task in suite.tasks.items()}
    every = {name for name, task in suite.tasks.items() if task.answers and task.answers.loss == "all"}
    return plan_prediction.predictions(plan.cells, sources, labels, every)


def planning(
    suite: Suite, plan: Plan, runs: Path = store.RUNS, predicted: Mapping[str, Predicted | str] | None = None
) -> dict[str, Any]:
    """Return the plan as one document, ready for JSON.

    Nothing is guessed: a Cell without a finished Record in `runs` has no estimate of time, and one that is not in
    `predicted` none of memory.
    """
    named = naming.full(plan.cells)
    newest = _newest({cell.cell_id for cell in plan.cells}, runs)
    rows: list[dict[str, Any]] = [
        {
            "cell_id": cell.cell_id,
            "id": plan.ids[cell.cell_id],
            "label": cell.label,
            "name": named[cell.cell_id],
            "cell": cell.model_dump(mode="json"),
            "last": _last(newest.get(cell.cell_id)),
            **_predicted((predicted or {}).get(cell.cell_id)),
        }
        for cell in plan.cells
    ]
    sizes = [row["predicted"]["total_B"] for row in rows if row["predicted"]]
    known = [c["last"] for c in rows if c["last"] is not None and c["last"]["status"] == Status.OK]
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "title": suite.title,
        "path": str(suite.path),
        "sha256": suite.sha256,
        "cells": rows,
        "comparisons": [c.model_dump(mode="json") for c in plan.comparisons],
        "estimate": {
            "cells": len(known),
            "of": len(rows),
            "predicted_B": max(sizes, default=None),
            "seconds": sum(last["duration_s"] for last in known) if known else None,
            "peak_memory_B": max((last["peak_memory_B"] or 0 for last in known), default=None),
        },
    }


def as_text(document: Mapping[str, Any]) -> str:
    """Lay the document of `planning` out for people."""
    rows = [[c["cell_id"], c["id"], c["name"], _expected(c), _said(c["last"])] for c in document["cells"]]
    questions = [f"  {c['kind']}: {c['says']}" for c in document["comparisons"]]
    return "\n".join(
        [
            f"{document['suite']}: {document['title']}",
            *align_columns(rows),
            *(["asks:", *questions] if questions else []),
            _summary(document["estimate"]),
            *_worth(document),
        ]
    )


def _predicted(found: Predicted | str | None) -> dict[str, Any]:
    """Return the keys of a Cell's prediction. total_B: the most that is on the device at one time, as far as it is known."""
    if not isinstance(found, Predicted):
        return {"predicted": None, "not_predicted": found or ""}
    return {"predicted": {**found.model_dump(), "total_B": found.total_B}, "not_predicted": ""}


def _expected(row: Mapping[str, Any]) -> str:
    parts = row["predicted"]
    if parts is None:
        return "no prediction" if row["not_predicted"] else ""
    passing = parts["activations_B"]
    with_what = "" if passing is None else f", activations {mebibytes(passing + (parts['logits_B'] or 0))}"
    by = f" by {parts['peak_by']}" if parts["peak_by"] else ""
    peak = f", in a step at most {mebibytes(parts['peak_B'])}{by}" if parts["peak_B"] is not None else ""
    step = f", the optimizer's step {mebibytes(parts['step_B'])}" if parts["step_B"] else ""
    host = f", {mebibytes(parts['optimizer_host_B'])} on the host" if parts["optimizer_host_B"] else ""
    return f"{mebibytes(parts['total_B'])} MiB: weights {mebibytes(parts['weights_B'])}{with_what}{step}{host}{peak}"


def _worth(document: Mapping[str, Any]) -> list[str]:
    """Say what the predictions are, and why some Cells have none."""
    said = []
    if any(row["predicted"] for row in document["cells"]):
        said.append(
            "memory is predicted from shapes, at the longest texts: tensors of weights, training and activations, without "
            "what an allocator wastes; activations only for models like Llama, and their logits where every token has a "
            "loss. What is in a step at most is counted by the step itself on tensors without data, on a CPU; where only "
            "answers have a loss, of answers of one token. Scoring and latencies are not in it. `peft-harness fit` says more"
        )
    untouched: dict[str, int] = {}
    for row in document["cells"]:
        if row["predicted"] and (what := row["predicted"]["untouched"]):
            untouched[what] = untouched.get(what, 0) + 1
    said += [f"of {plural(n, 'Cell')}: {what}" for what, n in untouched.items()]
    reasons: dict[str, int] = {}
    refused: dict[str, int] = {}
    for row in document["cells"]:
        if row["not_predicted"]:
            reasons[row["not_predicted"]] = reasons.get(row["not_predicted"], 0) + 1
    for row in document["cells"]:
        if row["predicted"] and (why := row["predicted"]["no_peak"]):
            refused[why] = refused.get(why, 0) + 1
    said += [f"no step was counted for {plural(n, 'Cell')}: {why}" for why, n in refused.items()]
    return said + [f"no prediction for {plural(n, 'Cell')}: {why}" for why, n in reasons.items()]


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
    counted = plural(count, "Cell")
    largest = estimate["predicted_B"]
    counted += f"; the largest is predicted to take {mebibytes(largest)} MiB" if largest is not None else ""
    if not known:
        return f"{counted}; no estimate of time without a finished run here"
    rest = f"; no estimate for the other {count - known}" if known < count else ""
    peak = f", peak {mebibytes(estimate['peak_memory_B'])} MiB" if estimate["peak_memory_B"] else ""
    return f"{counted}; {known} took {seconds(estimate['seconds'])} last time{peak}{rest}"
