"""Plan of a suite, as a document and as text: the Cells, their predicted memory and their newest Records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.assets.environments import folder
from harness.assets.environments import table as environments
from harness.assets.table import resolve
from harness.console import align_columns
from harness.errors import StoreError, first_names, plural
from harness.memory_model import plan_prediction
from harness.memory_model.plan_prediction import PlannedMemory, Refusal
from harness.methods import servers
from harness.records import naming, store
from harness.records.record import SCHEMA, Record, Status
from harness.report.formatting import mebibytes, seconds, short_count
from harness.suites.expand import Plan
from harness.suites.suite import Suite

_HEAD = ("cell", "name", "parameters", "memory, MiB", "time")


def predictions(suite: Suite, plan: Plan) -> dict[str, PlannedMemory | str]:
    """Return cell_id -> predicted memory of the Cell, or the reason why there is none."""
    base = suite.path.resolve().parent
    sources = {cell.model: resolve(cell.model, suite.sources, base) for cell in plan.cells}
    labels = {name: task.labels for name, task in suite.tasks.items()}
    every = {name for name, task in suite.tasks.items() if task.answers and task.answers.loss == "all"}
    return plan_prediction.predictions(plan.cells, sources, labels, every)


def planning(
    suite: Suite, plan: Plan, runs: Path = store.RUNS, predicted: Mapping[str, PlannedMemory | str] | None = None
) -> dict[str, Any]:
    """Return the plan as one document, ready for JSON.

    Nothing is guessed. A Cell has an estimate of time only if its newest Record in `runs` is ok, and an estimate of
    memory only if `predicted` contains the Cell.
    """
    named = naming.full(plan.cells)
    places = {entry.id: entry.where for entry in suite.entries}
    newest = _newest({cell.cell_id for cell in plan.cells}, runs)
    rows: list[dict[str, Any]] = [
        {
            "cell_id": cell.cell_id,
            "id": plan.ids[cell.cell_id],
            "where": places[plan.ids[cell.cell_id]],
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


def lines(document: Mapping[str, Any], most: int | None = None) -> list[str]:
    """Return the lines of the plan: a table with one line per Cell, then the comparisons and the meaning of the numbers.

    most: number of Cells to show. None means all.
    """
    cells = document["cells"][:most]
    rows = [_HEAD, *((c["cell_id"], c["name"], *_sizes(c), _time(c["last"])) for c in cells)]
    hidden = len(document["cells"]) - len(cells)
    questions = [f"  {c['kind']}: {c['says']}" for c in document["comparisons"]]
    return [
        ": ".join(filter(None, [document["suite"], document["title"]])),
        *align_columns(rows, right=range(2, len(_HEAD))),
        *([f"  ... and {plural(hidden, 'more Cell')}: --all shows them"] if hidden else []),
        *(["compares:", *questions] if questions else []),
        _summary(document["estimate"]),
        *_notes(document["cells"]),
    ]


def _predicted(found: PlannedMemory | str | None) -> dict[str, Any]:
    """Return fields of a Cell: `predicted`, its predicted memory, or `not_predicted`, the reason why it has none.

    `refused` is true if this reason also prevents the Cell from running. `predicted` has the key `total_B`: the
    predicted peak memory of the device, or a lower bound of it.
    """
    if not isinstance(found, PlannedMemory):
        return {"predicted": None, "not_predicted": found or "", "refused": isinstance(found, Refusal)}
    predicted = {**found.model_dump(), "total_B": found.total_B}
    return {"predicted": predicted, "not_predicted": "", "refused": False}


def _sizes(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return two texts: the number of trainable parameters, and the predicted memory in MiB."""
    if (predicted := row["predicted"]) is None:
        return "-", "-"
    return short_count(predicted["trainable"]), f"{'≥ ' * _is_least(row)}{mebibytes(predicted['total_B'])}"


def _is_least(row: Mapping[str, Any]) -> bool:
    """Return whether the predicted memory of a training run is only a lower bound, as it leaves out the activations."""
    predicted, trains = row["predicted"], row["cell"]["training"]["steps"] > 0
    return bool(predicted and trains and predicted["peak_B"] is None and predicted["activations_B"] is None)


def _notes(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what the predictions leave out. Then yield each reason why predictions are missing or partial.

    Each reason comes with the number of Cells that it affects.
    """
    predicted = [row["predicted"] for row in cells if row["predicted"]]
    if predicted:
        yield (
            "parameters: those that train; memory: predicted, without allocator overhead, evaluation and latency "
            "(`peft-harness explain memory`); time: that of the newest run here"
        )
    if any(map(_is_least, cells)):
        yield "≥: without activations, so the training needs more"
    for name, n in Counter(row["cell"]["serve"] for row in cells if row["cell"]["serve"]).items():
        home = environments.load().get(servers.find(name).environment)
        if home is not None and folder.read(folder.place(home)) is None:
            what = f"{plural(n, 'Cell')}: served only if {name} is installed"
            yield f"{what}; `peft-harness env create {home.name}` makes an environment with it"
    for what, n in Counter(p["untouched"] for p in predicted if p["untouched"]).items():
        yield f"of {plural(n, 'Cell')}: {what}"
    for by, n in Counter(p["peak_by"] for p in predicted if p["peak_by"]).items():
        yield f"memory of {plural(n, 'Cell')}: predicted with {by}"
    for why, n in Counter(p["no_peak"] for p in predicted if p["no_peak"]).items():
        yield f"no training step simulated for {plural(n, 'Cell')}: {why}"
    for why, n in Counter(row["not_predicted"] for row in cells if not row["refused"]).items():
        if why:
            yield f"no prediction for {plural(n, 'Cell')}: {why}"
    places: dict[str, list[str]] = {}
    for row in cells:
        if row["refused"]:
            places.setdefault(row["not_predicted"], []).append(row["where"])
    for why, of_entries in places.items():
        yield f"{first_names(list(dict.fromkeys(of_entries)))}: {plural(len(of_entries), 'Cell')} cannot run: {why}"


def _newest(wanted: set[str], runs: Path) -> dict[str, Record]:
    files = [path for path in runs.glob("*/cells/*.json") if path.name.partition(".")[0] in wanted]
    newest: dict[str, Record] = {}
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        cell_id = path.name.partition(".")[0]
        if cell_id not in newest:
            try:
                newest[cell_id] = store.read_record(path)
            except StoreError:
                continue  # a torn file: use an older one; `report` shows the torn file
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


def _time(last: Mapping[str, Any] | None) -> str:
    """Return the duration of the newest Record as text. If the Record is not ok, add its status."""
    if last is None:
        return "-"
    return f"{'' if last['status'] == Status.OK else last['status'] + ' after '}{seconds(last['duration_s'])}"


def _summary(estimate: Mapping[str, Any]) -> str:
    count, known, largest = estimate["of"], estimate["cells"], estimate["predicted_B"]
    text = plural(count, "Cell") + (
        f"; largest predicted memory {mebibytes(largest)} MiB" if largest is not None else ""
    )
    if not known:
        return f"{text}; time unknown until they have run here once"
    rest = f"; time unknown for the other {count - known}" if known < count else ""
    size = estimate["peak_memory_B"]
    peak = f", peak of a whole process {mebibytes(size)} MiB" if size else ""
    return f"{text}; {known} took {seconds(estimate['seconds'])} last time{peak}{rest}"
