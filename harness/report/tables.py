"""Two sortable tables of the report: the comparison of the Cells, and their memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness.analysis import contention, failed_checks, measurements, metrics
from harness.analysis.run_facts import RunFacts
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER, FOOTPRINT_SHOWN_B
from harness.errors import first_names, plural
from harness.records.record import Cell, Memory, Record
from harness.report import formatting, recipes
from harness.report.formatting import Field, field, unmeasured
from harness.report.metric_field import metric_field
from harness.report.table_model import Table, column, measured, table
from harness.report.tones import icon, tone

_EXPECTED = (
    f"after ≈ the prediction from the shape of the model, flagged if they differ by more than {FOOTPRINT_LEDGER:.0%} and "
    f"{FOOTPRINT_SHOWN_B // formatting.MIB} MiB"
)
STATUS = "status"
"""Key of the status column in the comparison table. Any other column has the name of its metric as its key."""
_NAMED = 3
"""Maximum number of busy Cells that a note names. A Cell is busy if other programs used the CPU while it was timed."""


def comparison(facts: RunFacts, cells: Sequence[Cell] | None = None) -> Table:
    """Return the comparison table, with the status, metrics and Record of each planned Cell, measured or not.

    cells: the only Cells to show; None for all.
    """
    columns = [column("Status", number=False, key=STATUS)]
    for metric in metrics.shown():
        columns.append(column(metric.heading, metric.meaning, key=metric.name))
        if metric is metrics.ACCURACY:
            title = "accuracy of the recipe minus the highest of its budget; ≈: no test tells the two apart"
            columns.append(column("To the highest, points", title))
    columns.append(column("Record", number=False))
    rows = ((cell, list(_fields(facts, cell))) for cell in (facts.run.manifest.cells if cells is None else cells))
    notes = [*_unreferenced_note(facts), *_imported_notes(facts), *_busy_note(facts)]
    return table(facts, "cells", "Every expected Cell", columns, rows, notes=notes, anchored=True)


def _fields(facts: RunFacts, cell: Cell) -> Iterator[Field]:
    record = facts.latest.get(cell.cell_id)
    yield _status(facts, cell)
    for metric in metrics.shown():
        missing = record is None or (record.measurements is None and metric.read(record) is None)
        yield unmeasured(facts.why_unmeasured(cell)) if missing or record is None else metric_field(metric, record)
        if metric is metrics.ACCURACY:
            is_measured = record is not None and record.measurements is not None
            yield _standing(facts, cell) if is_measured else unmeasured(facts.why_unmeasured(cell))
    if record is None:
        yield unmeasured(facts.why_unmeasured(cell))
    else:
        yield field(f"{record.cell_id[:6]}….{record.attempt}", record.id, why=record.id, tone="code")


def _busy(facts: RunFacts) -> list[tuple[str, str]]:
    """Return pairs (name, evidence) of the busy Cells, whose steps or passes waited for a CPU."""
    return [(facts.titles[r.cell_id], why) for r in facts.latest.values() if (why := contention.busy(r))]


def _unreferenced_note(facts: RunFacts) -> list[str]:
    """Return a list with one note on the Cells that had no reference to compare with.

    If there are no such Cells, return an empty list.
    """
    found = [(facts.titles[r.cell_id], why) for r in facts.latest.values() if (why := failed_checks.unreferenced(r))]
    names = ", ".join(title for title, _ in found)
    return [f"{found[0][1]}, nor for the claims of their papers: {names}."] if found else []


def _imported_notes(facts: RunFacts) -> list[str]:
    """Return a note for each Cell with an imported adapter: its origin, what is unknown, and whether its loss fits."""
    found = [(facts.titles[r.cell_id], r.imported) for r in facts.latest.values() if r.imported]
    return [
        f"{name}: {one.origin}. Not known: {', '.join(one.unknown) or 'nothing'}. {one.loss_sentence}."
        for name, one in found
    ]


def short_notes(facts: RunFacts) -> list[str]:
    """Return the notes on the comparison table for the terminal. The notes on the page are longer."""
    names = first_names([name for name, _ in _busy(facts)], _NAMED)
    text = (
        f"busy: other programs used the CPU, so these times may be too high: {names}. Rule: peft-harness explain busy"
    )
    return [*_unreferenced_note(facts), *_imported_notes(facts), *([text] if names else [])]


def _busy_note(facts: RunFacts) -> list[str]:
    """Return a list with one note on the busy Cells. The note states when a Cell counts as busy.

    If no Cell was busy, return an empty list.
    """
    found = [f"{name}, {why}" for name, why in _busy(facts)]
    more = f"; and {len(found) - _NAMED} more Cells" if len(found) > _NAMED else ""
    return [f"{contention.RULE}: {'; '.join(found[:_NAMED])}{more}."] if found else []


def _status(facts: RunFacts, cell: Cell) -> Field:
    status = facts.status(cell)
    record = facts.latest.get(cell.cell_id)
    failed = failed_checks.failed(record) if record else []
    if failed and status == "ok":
        count = plural(len(failed), "failed check")
        why = ", ".join(c.check for c in failed)
        return field(f"{icon('fail')} ok, {count}", status, why=why, tone=tone("fail"), more={"failed checks": why})
    text, why = status, "" if status == "ok" else facts.why_unmeasured(cell)
    more = {"reason": why} if why else {}
    if status == "ok" and record and record.imported:
        text, why, more = "ok, imported", record.imported.origin, {"reason": "imported"}
        if contradiction := record.imported.loss_contradiction:
            text, why = "ok, imported, but its loss is not that of its log", contradiction
    if status == "ok" and record and (no_reference := failed_checks.unreferenced(record)):
        text, why, more = "ok, no reference", no_reference, {"reason": "no reference"}
    return field(f"{icon(status)} {text}", status, why=why, tone=tone(status), more=more)


def _standing(facts: RunFacts, cell: Cell) -> Field:
    entry = facts.entries.get(cell.cell_id)
    if entry is None:
        swept = any(cell.cell_id in tuning.sweep for tuning in facts.run.manifest.tuning)
        return unmeasured("a try of the search for a learning rate is not ranked" if swept else "not scored")
    group = facts.group_of[cell.cell_id]
    if len(group.entries) == 1:
        return unmeasured("no other recipe has this budget, these seeds and this number of learning rates tried")
    if entry.standing == "best" and not group.is_ranking:
        return unmeasured("there is no other trained Cell to rank it with")
    return recipes.gap(group, entry)


def memory(facts: RunFacts) -> Table:
    """Return the memory table. It shows, for each Cell, the bytes of its tensors and the peak memory in every phase.

    The peak of training comes first.
    """
    phases = dict.fromkeys(p.name for r in facts.latest.values() for p in r.phases)
    names = sorted(phases, key=lambda name: name != "train")
    peaks = [
        column(f"Peak: {name}, MiB", f"highest memory in the phase “{name}”, minus that after imports")
        for name in names
    ]
    columns = [
        *peaks[:1],
        *(
            column(f"{name}, MiB", f"sum over tensors; {_EXPECTED}")
            for name in ("Weights", "Adapter", "Gradients", "Optimizer")
        ),
        column(
            "Other in training, MiB",
            "training peak minus the four columns to the left: activations, buffers, overhead of the allocator; after ≈ the "
            "prediction for activations and logits of the longest texts, or for the optimizer step if it needs more",
        ),
        column(
            "Tensors in a step, MiB",
            "counted memory of tensors at one time in a training step; on a CPU in one more step after the training, "
            "which includes the SVD of GaLore only if that step computes one; after ≈ the same step on fake tensors, "
            f"flagged if they differ by more than {FOOTPRINT_LEDGER:.0%}",
        ),
        *peaks[1:],
        column("After imports, MiB", "memory of the process before the model was loaded; no column includes it"),
        column("Source", "method of measuring the peaks", number=False),
    ]
    return table(facts, "memory", "Memory", columns, _memory_rows(facts, names))


def _memory_rows(facts: RunFacts, phases: list[str]) -> Iterator[tuple[Cell, list[Field]]]:
    for record, m in measured(facts):
        peaks = {
            p.name: measurements.above_imports(record, p.peak_memory_B)
            for p in record.phases
            if p.peak_memory_B is not None
        }
        shown = [_bytes(peaks.get(name), "no such phase, or no peak of it") for name in phases]
        yield (
            record.cell,
            [
                *shown[:1],
                *(_with_prediction(m.memory, part) for part in ("weights", "adapter", "gradients")),
                _with_host(m.memory),
                _rest(record, m.memory),
                _in_step(m.memory),
                *shown[1:],
                _bytes(m.memory.baseline_B),
                field(m.memory.source, m.memory.source),
            ],
        )


def _with_prediction(memory: Memory, part: str, counted: int | None = None) -> Field:
    """Return the field for one kind of tensors, e.g. the weights. It shows the predicted size in small print.

    part: name of the kind in `Memory`. counted: size in bytes; by default, the attribute `<part>_B` of `memory`.
    """
    size: int = getattr(memory, f"{part}_B") if counted is None else counted
    if memory.predicted is None:
        return _bytes(size) | {"why": f"not predicted: {memory.not_predicted}" if memory.not_predicted else ""}
    expected = getattr(memory.predicted, f"{part}_B")
    error = abs(expected - size)
    off = error > FOOTPRINT_LEDGER * size and error > FOOTPRINT_SHOWN_B
    return _bytes(size) | {
        "small": f"≈ {formatting.mebibytes(expected)}",
        "why": f"predicted {expected:,} B, counted {size:,} B",
        "flag": "not as predicted" if off else "",
        "more": {"predicted": expected},
    }


def _in_step(memory: Memory) -> Field:
    """Return the field for the largest memory of all tensors in a training step, with its prediction in small print."""
    if (counted := memory.counted_peak_B) is None:
        return unmeasured("not trained, or not counted")
    predicted = memory.predicted
    if predicted is None or predicted.peak_B is None:
        return _bytes(counted) | {"why": f"not predicted: {why}" if predicted and (why := predicted.no_peak) else ""}
    shown = _with_prediction(memory, "peak", counted)
    return shown | {"why": shown["why"] + (f", by {predicted.peak_by}" if predicted.peak_by else "")}


def _with_host(memory: Memory) -> Field:
    """Return the field for the optimizer's state. It also shows the bytes of the state in the host's memory, if any."""
    shown = _with_prediction(memory, "optimizer")
    expected = memory.predicted.optimizer_host_B if memory.predicted else 0
    if not (memory.optimizer_host_B or expected):
        return shown
    host = f"{memory.optimizer_host_B:,} B more in the host's memory"
    host += f", predicted {expected:,} B" if memory.predicted else ""
    small = f"{shown['small']}, + {formatting.mebibytes(memory.optimizer_host_B)} on the host".removeprefix(", ")
    more = shown["more"] | {"on the host": memory.optimizer_host_B}
    return shown | {"small": small, "why": "; ".join(filter(None, [shown["why"], host])), "more": more}


def _rest(record: Record, memory: Memory) -> Field:
    """Return the field for the training peak minus the memory after imports and minus the counted tensors."""
    peak = measurements.training_peak(record)
    if peak is None:
        return unmeasured("no peak of a training phase")
    counted = memory.baseline_B + memory.weights_B + memory.adapter_B + memory.gradients_B + memory.optimizer_B
    predicted = memory.predicted
    shown = _bytes(peak - counted)
    if predicted is None or predicted.activations_B is None:
        return shown
    return shown | {
        "small": f"≈ {formatting.mebibytes(predicted.passing_B)}",
        "more": {"predicted": predicted.passing_B},
    }


def _bytes(size: int | None, missing: str = "") -> Field:
    if size is None:
        return unmeasured(missing)
    if size < 0:
        why = "less than the sum of the tensors: some of them were never resident, or lie in shared pages"
        return field(f"{formatting.MINUS}{formatting.mebibytes(-size)}", size, why=why)
    return field(formatting.mebibytes(size), size)


def raw(facts: RunFacts) -> list[dict[str, Any]]:
    """Return the numbers of the comparison table in base units, for download: one dict per planned Cell."""
    return [_raw(facts, cell, facts.latest.get(cell.cell_id)) for cell in facts.run.manifest.cells]


def _raw(facts: RunFacts, cell: Cell, record: Record | None) -> dict[str, Any]:
    accuracy = record.accuracy if record else None
    return {
        "record": record.id if record else None,
        "cell": cell.model_dump(mode="json"),
        "label": facts.titles[cell.cell_id],
        "status": facts.status(cell),
        "because": record.because if record else facts.why_unmeasured(cell),
        **{metric.name: metric.value(record) if record else None for metric in metrics.shown()},
        "accuracy_low": accuracy.low if accuracy else None,
        "accuracy_high": accuracy.high if accuracy else None,
        "busy": contention.busy(record) if record else "",
    }
