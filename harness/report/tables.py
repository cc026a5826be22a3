"""Sortable tables: comparison, latency, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.analysis import contention, failed_checks, measurements, metrics
from harness.analysis.run_facts import RunFacts
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER, FOOTPRINT_SHOWN_B
from harness.errors import plural
from harness.records.record import Cell, Memory, Predicted, Record
from harness.report import formatting, latencies, links
from harness.report.formatting import Figure, figure, unmeasured
from harness.report.metric_figure import metric_figure
from harness.report.table_model import Table
from harness.report.table_model import column as _column
from harness.report.table_model import measurements as _measurements
from harness.report.table_model import table as _table
from harness.report.tones import icon, tone

_EXPECTED = (
    f"after ≈ the prediction from the model's shape, flagged where they differ by more than {FOOTPRINT_LEDGER:.0%} and "
    f"{FOOTPRINT_SHOWN_B // formatting.MIB} MiB"
)
STATUS = "status"
"""Key of the comparison table's first column; the key of a metric is its name."""
_RANK = "Against the best"
_NAMED = 3
"""Busy Cells that the note names; each is also flagged in its row."""


def comparison(facts: RunFacts) -> Table:
    """Tabulate every expected Cell, measured or not: its status, its metrics, its Record."""
    columns = [_column("Status", number=False, key=STATUS)]
    for metric in metrics.shown():
        columns.append(_column(metric.heading, metric.meaning, key=metric.name))
        if metric is metrics.ACCURACY:
            columns.append(
                _column(_RANK, "among Cells with an equal budget; paired on the same items where there is a p")
            )
    columns.append(_column("Record", number=False))
    rows = []
    for cell in facts.run.manifest.cells:
        record = facts.latest.get(cell.cell_id)
        figures = [_status(facts, cell), *_metrics(facts, cell, record)]
        figures.append(
            figure(f"{record.cell_id[:6]}….{record.attempt}", record.id, why=record.id, tone="code")
            if record
            else unmeasured(facts.why_unmeasured(cell))
        )
        rows.append({"cell": cell, "figures": figures, "anchor": links.anchor(facts, cell.cell_id)})
    return _table(
        facts, "cells", "Every expected Cell", columns, rows, [*_unreferenced_note(facts), *_busy_note(facts)]
    )


def _metrics(facts: RunFacts, cell: Cell, record: Record | None) -> Iterator[Figure]:
    for metric in metrics.shown():
        missing = record is None or (record.measurements is None and metric.read(record) is None)
        yield unmeasured(facts.why_unmeasured(cell)) if missing or record is None else metric_figure(metric, record)
        if metric is metrics.ACCURACY:
            measured = record is not None and record.measurements is not None
            yield _standing(facts, cell) if measured else unmeasured(facts.why_unmeasured(cell))


def _unreferenced_note(facts: RunFacts) -> list[str]:
    """Return a note on Cells without a reference, so that they do not seem checked."""
    found = [(facts.titles[r.cell_id], why) for r in facts.latest.values() if (why := failed_checks.unreferenced(r))]
    names = ", ".join(title for title, _ in found)
    return [f"{found[0][1]}, nor for what their papers say: {names}."] if found else []


def short_notes(facts: RunFacts) -> list[str]:
    """Return the notes of the comparison for the terminal; the page has the rule and the numbers."""
    busy = [facts.titles[r.cell_id] for r in facts.latest.values() if contention.busy(r)]
    if not busy:
        return _unreferenced_note(facts)
    names = ", ".join([*busy[:_NAMED], *([f"and {len(busy) - _NAMED} more"] if len(busy) > _NAMED else [])])
    text = (
        f"busy: other programs used the CPU, so that these times are too high: {names}. Rule: peft-harness explain busy"
    )
    return [*_unreferenced_note(facts), text]


def _busy_note(facts: RunFacts) -> list[str]:
    """Return a note with the rule of the flag on busy Cells, if any row has the flag."""
    found = [f"{facts.titles[r.cell_id]}, {why}" for r in facts.latest.values() if (why := contention.busy(r))]
    more = f"; and {len(found) - _NAMED} more Cells" if len(found) > _NAMED else ""
    return [f"{contention.RULE}: {'; '.join(found[:_NAMED])}{more}."] if found else []


def _status(facts: RunFacts, cell: Cell) -> Figure:
    status = facts.status(cell)
    record = facts.latest.get(cell.cell_id)
    red = failed_checks.failed(record) if record else []
    if red and status == "ok":
        count = plural(len(red), "failed check")
        return figure(f"{icon('fail')} ok, {count}", status, why=", ".join(c.check for c in red), tone=tone("fail"))
    if status == "ok" and record and (alone := failed_checks.unreferenced(record)):
        return figure(f"{icon(status)} ok, no reference", status, why=alone, tone=tone(status))
    why = "" if status == "ok" else facts.why_unmeasured(cell)
    return figure(f"{icon(status)} {status}", status, why=why, tone=tone(status))


def _standing(facts: RunFacts, cell: Cell) -> Figure:
    entry = facts.entries.get(cell.cell_id)
    if entry is None:
        swept = any(cell.cell_id in tuning.sweep for tuning in facts.run.manifest.tuning)
        return unmeasured("a try of the search for a learning rate: not ranked" if swept else "not scored")
    group = next(g for g in facts.groups if entry in g.entries)
    if len(group.entries) == 1:
        return unmeasured("nothing else has this budget, these seeds and as many learning rates tried")
    if entry.standing == "best":
        return (
            figure("best", 0.0, tone="good")
            if group.is_ranking
            else unmeasured("no other trained Cell to rank it with")
        )
    why = "judged by the intervals: the test items are not the same"
    if entry.p is not None:
        test = "exact McNemar test of these two checkpoints"
        if len(entry.records) > 1:
            test = f"t test of the means over {len(entry.records)} seeds"
        why = f"{formatting.probability(entry.p)}, {test}, Holm-adjusted"
    return figure(entry.standing, entry.difference, small=formatting.points(entry.difference), why=why)


def latency(facts: RunFacts) -> Table:
    """Tabulate forward times of base, unmerged and merged model, and their ratios."""
    columns = [
        _column("What", "kind of forward pass, batch x tokens", number=False),
        *(_column(f"{v}, ms", latencies.TITLE) for v in ("Base", "Unmerged", "Merged")),
        _column("Unmerged / base", "ratio of medians: what an adapter costs at inference"),
        _column("Merged / base", "ratio of medians: 1 if merging takes that cost away"),
    ]
    rows = []
    for cell, m in _measurements(facts):
        mixed = latencies.mixed(m.latency)  # those have a separate table
        alone = [x for x in m.latency if x not in mixed]
        for kind, batch, tokens in dict.fromkeys((x.kind, x.batch, x.tokens) for x in alone):
            found = {x.variant: x for x in alone if (x.kind, x.batch, x.tokens) == (kind, batch, tokens)}
            base, unmerged, merged = (found.get(v) for v in ("base", "unmerged", "merged"))
            record = facts.latest[cell.cell_id]
            refused, merged_refused = failed_checks.no_speed(record), failed_checks.no_merged_speed(record)
            figures = [
                figure(f"{kind} {batch} × {tokens}", f"{kind} {batch:06} {tokens:06}"),
                latencies.shown(base),
                latencies.shown(unmerged, refused),
                latencies.shown(merged, merged_refused),
                latencies.ratio(unmerged, base, refused),
                latencies.ratio(merged, base, merged_refused),
            ]
            rows.append({"cell": cell, "figures": figures})
    return _table(facts, "latency", "Latency of inference", columns, rows)


def memory(facts: RunFacts) -> Table:
    """Tabulate the ledger: bytes counted by tensor, then the process's peak in every phase."""
    names = list(dict.fromkeys(p.name for r in facts.latest.values() for p in r.phases))
    columns = [
        _column("After imports", "the process before the model was loaded"),
        *(_column(name, f"sum over tensors; {_EXPECTED}") for name in ("Weights", "Adapter", "Gradients", "Optimizer")),
        _column(
            "Other in training",
            "training peak minus all to the left: activations, buffers, the allocator's slack; after ≈ the prediction "
            "of activations and logits, at the longest texts, or of the optimizer's step, if that is more",
        ),
        _column(
            "Tensors in a step",
            "memory of tensors at one time in a training step, counted; on a CPU in one more step after the "
            "training, so that GaLore's SVD is in it only where that step has one; after ≈ the same step on fake "
            f"tensors, flagged where they differ by more than {FOOTPRINT_LEDGER:.0%}",
        ),
        *(_column(f"Peak: {name}", f"highest memory inside the phase “{name}”") for name in names),
        _column("Source", "how the peaks were taken", number=False),
    ]
    rows = []
    for cell, m in _measurements(facts):
        record = facts.latest[cell.cell_id]
        parts = {name: getattr(m.memory, f"{name}_B") for name in ("weights", "adapter", "gradients", "optimizer")}
        taken = m.memory.baseline_B + sum(parts.values())
        peak = measurements.training_peak(record)
        peaks = {p.name: p.peak_memory_B for p in record.phases}
        figures = [
            _bytes(m.memory.baseline_B),
            *(_with_prediction(size, name, m.memory) for name, size in parts.items() if name != "optimizer"),
            _with_host(_with_prediction(parts["optimizer"], "optimizer", m.memory), m.memory),
            _bytes(peak - taken) | _rest(m.memory.predicted)
            if peak is not None
            else unmeasured("no peak of a training phase"),
            _in_step(m.memory),
            *(
                _bytes(size) if (size := peaks.get(name)) is not None else unmeasured("no such phase, or no peak of it")
                for name in names
            ),
            figure(m.memory.source, m.memory.source),
        ]
        rows.append({"cell": cell, "figures": figures})
    return _table(facts, "memory", "Memory, MiB", columns, rows)


def _with_prediction(size: int, part: str, memory: Memory) -> Figure:
    """Return the figure of one part of the ledger: counted, with the prediction in small print."""
    if memory.predicted is None:
        return _bytes(size) | {"why": f"not predicted: {memory.not_predicted}" if memory.not_predicted else ""}
    expected = getattr(memory.predicted, f"{part}_B")
    error = abs(expected - size)
    off = error > FOOTPRINT_LEDGER * size and error > FOOTPRINT_SHOWN_B
    why = f"predicted {expected:,} B, counted {size:,} B"
    return _bytes(size) | {
        "small": f"≈ {formatting.mebibytes(expected)}",
        "why": why,
        "flag": "not as predicted" if off else "",
    }


def _in_step(memory: Memory) -> Figure:
    """Return the figure of the tensors in a step: counted, with the prediction on fake tensors in small print."""
    if (counted := memory.counted_peak_B) is None:
        return unmeasured("not trained, or not counted")
    predicted = memory.predicted
    if predicted is None or predicted.peak_B is None:
        return _bytes(counted) | {"why": f"not predicted: {why}" if predicted and (why := predicted.no_peak) else ""}
    shown = _with_prediction(counted, "peak", memory)
    return shown | {"why": shown["why"] + (f", by {predicted.peak_by}" if predicted.peak_by else "")}


def _with_host(shown: Figure, memory: Memory) -> Figure:
    """Add to the optimizer's figure its state in the host's memory, which no other figure includes."""
    expected = memory.predicted.optimizer_host_B if memory.predicted else 0
    if not (memory.optimizer_host_B or expected):
        return shown
    host = f"{memory.optimizer_host_B:,} B more in the host's memory"
    host += f", predicted {expected:,} B" if memory.predicted else ""
    small = f"{shown['small']}, + {formatting.mebibytes(memory.optimizer_host_B)} on the host".removeprefix(", ")
    return shown | {"small": small, "why": "; ".join(filter(None, [shown["why"], host]))}


def _rest(predicted: Predicted | None) -> Figure:
    if predicted is None or predicted.activations_B is None:
        return {}
    return {"small": f"≈ {formatting.mebibytes(predicted.passing_B)}"}


def _bytes(size: int) -> Figure:
    if size < 0:
        why = "less than the tensors add up to: some of them were never resident, or lie in shared pages"
        return figure(f"{formatting.MINUS}{formatting.mebibytes(-size)}", size, why=why)
    return figure(formatting.mebibytes(size), size)


def raw(facts: RunFacts) -> list[dict[str, Any]]:
    """Return the comparison's numbers in base units, for download."""
    return [_raw(facts, cell, facts.latest.get(cell.cell_id)) for cell in facts.run.manifest.cells]


def _raw(facts: RunFacts, cell: Cell, record: Record | None) -> dict[str, Any]:
    accuracy = record.measurements.accuracy if record and record.measurements else None
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
