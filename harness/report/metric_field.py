"""Table fields for metrics. A field shows the value in the unit of its column, and further details for some metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.analysis import contention, measurements
from harness.analysis.metrics import Metric, Number
from harness.records.record import Record
from harness.report import formatting
from harness.report.formatting import Field, field, unmeasured


def metric_field(metric: Metric, record: Record) -> Field:
    """Return the field of a metric for one Record. If the Record has no value, the field is a dash with the reason."""
    value = metric.value(record)
    if value is None:
        return unmeasured(metric.why_missing(record))
    details = _DETAILS.get(metric.name)
    return field(written(metric, value), value) | (details(record) if details else {})


def written(metric: Metric, value: Number) -> str:
    """Format a value in the unit of the column: bytes as MiB, shares as per cent, step times as ms."""
    if metric.unit == "B":
        return formatting.mebibytes(value)
    if metric.unit == "share":
        return formatting.percent(value)
    if metric.unit == "s":
        return formatting.milliseconds(value) if metric.heading.endswith("ms") else f"{value:.1f}"
    return f"{value:,.0f}"


def _of_parameters(record: Record) -> dict[str, Any]:
    m = record.measurements
    return {"why": f"{formatting.short_count(m.parameters.total)} parameters in total"} if m else {}


def _of_accuracy(record: Record) -> dict[str, Any]:
    a = record.accuracy
    if a is None:
        return {}
    why = f"{a.metric}, {a.interval}, scored by {a.scored_by}"
    more: dict[str, float | str] = {**formatting.ends(a)}
    if a.cut_items:
        limit = record.cell.training.max_tokens
        why += f"; {a.cut_items:,} of {len(a.items):,} items were truncated to {limit} tokens"
        more["truncated"] = f"{a.cut_items} of {len(a.items)} items"
    return {"small": formatting.interval(a), "why": why, "more": more}


def _of_rate(record: Record) -> dict[str, Any]:
    busy = contention.busy(record)
    return {"flag": "busy" if busy else "", "why": busy}


def _of_step(record: Record) -> dict[str, Any]:
    training, rate = measurements.timed_training(record), _of_rate(record)
    if training is None:
        return rate
    step = measurements.step_time(training)
    why = "; ".join(filter(None, [f"{step.count} steps", rate["why"]]))
    return rate | {"small": formatting.median_ms(step), "why": why, "more": formatting.ends(step)}


_DETAILS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "trainable": _of_parameters,
    "accuracy": _of_accuracy,
    "tokens_per_s": _of_rate,
    "step_s": _of_step,
}
