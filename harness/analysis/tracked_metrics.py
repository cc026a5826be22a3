"""Values of a Record that the history stores, by metric, and the place where the Record was made.

The metrics are those of `metrics.METRICS` with a name in the history, and `latency_s/<variant>/<kind>/<batch>x<tokens>`,
medians of raw samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from harness.analysis import contention, failed_checks, measurements, metrics
from harness.analysis.metrics import MetricKind
from harness.records.notes import concurrent_cells
from harness.records.record import Record, Status

STEP, PEAK = metrics.STEP.history, metrics.TRAINING_PEAK.history
LATENCY = "latency_s"
SENTINEL = f"{LATENCY}/base/"
"""Prefix of latencies of the bare base model, which no adapter's code touches. Every Cell with latencies measures it."""
BESIDE = "beside it"
"""Key of a place that is present where other Cells ran at the same time."""


@dataclass(frozen=True)
class TrackedMetrics:
    """Tracked values of one Record."""

    values: dict[str, float]
    """Values by metric."""
    untimed: str = ""
    """Reason for no times; empty if there are some."""


def kind(metric: str) -> MetricKind | None:
    """Return how a metric is judged, or None for a name that is no metric."""
    if metric.startswith(f"{LATENCY}/"):
        return "timed"
    declared = metrics.in_history(metric)
    return declared.kind if declared else None


def names() -> list[str]:
    """Return the names of all metrics, the family of latencies as one."""
    return [LATENCY, *(metric.history for metric in metrics.METRICS if metric.history)]


def slack(metric: str, level: float) -> float:
    """Return the largest difference from a level that is no change, of a metric that is neither a time nor a score."""
    declared = metrics.in_history(metric)
    return max(declared.slack_B, declared.slack_share * level) if declared else 0


def got_worse(metric: str, old: float, new: float) -> bool:
    """Return whether a change of a metric that is neither a time nor a score is a regression."""
    declared = metrics.in_history(metric)
    return declared.got_worse(old, new) if declared else new > old


def tracked(record: Record) -> TrackedMetrics:
    """Return the values of a Record: none unless it is ok, and no times of a Cell that waited for its CPU."""
    if record.measurements is None or record.status is not Status.OK:
        return TrackedMetrics({})
    values: dict[str, float] = {}
    for metric in metrics.METRICS:
        tracked = metric.history and metric.kind != "timed" and metric.applies(record)
        if tracked and (value := metric.read(record)) is not None:
            values[metric.history] = _short(value) if metric.kind == "score" else value
    untimed = failed_checks.no_speed(record)
    if not untimed and (busy := contention.busy(record)):
        untimed = f"its steps waited for a CPU: {busy}"
    return TrackedMetrics(values if untimed else values | times(record), untimed)


def times(record: Record) -> dict[str, float]:
    """Return the times of a Record in seconds, by metric: steady step and latencies; none that a failed check forbids."""
    m = record.measurements
    if m is None:
        return {}
    timed = (metric for metric in metrics.METRICS if metric.history and metric.kind == "timed")
    found = {metric.history: value for metric in timed if (value := metric.read(record)) is not None}
    refused = {"merged": failed_checks.no_merged_speed(record), "multi-adapter": failed_checks.no_mixed_speed(record)}
    for one in m.latency:
        if one.seconds and not refused.get(one.variant):
            beside = "-beside-several" if measurements.beside_several(record.cell, one) else ""
            found[f"{LATENCY}/{one.variant}{beside}/{one.kind}/{one.batch}x{one.tokens}"] = median(one.seconds)
    # A time of 0 is no measurement: the clock did not move.
    return {name: _short(seconds) for name, seconds in found.items() if seconds > 0}


def _short(value: float) -> float:
    """Round to six digits: smaller differences are no finding, and files stay small."""
    return float(f"{value:.6g}")


def sentinel(metric: str, quantization: str) -> bool:
    """Return whether a metric is a time of the bare, unquantised base: no code of a method or implementation can change
    it."""
    return metric.startswith(SENTINEL) and quantization == "none"


def place(record: Record) -> dict[str, str]:
    """Return the place of a Record: all facts that must be equal before its numbers are compared."""
    e = record.environment
    software = {name: e.software.get(name, "none") for name in ("torch", "triton")}
    beside = {BESIDE: "other Cells"} if concurrent_cells(record) > 1 else {}
    threads = {"threads": str(e.threads or "unknown")}
    if record.device in ("", "cpu"):
        names = {"CPU": "cpu", "architecture": "architecture", "cores": "cores"}
        machine = {said: e.machine.get(name, "unknown") for said, name in names.items()}
        return {"device": "cpu", **machine, **software, **threads, **beside}
    # uuid, name, driver, memory: another card of the same model is the same place.
    gpu = [part.strip() for part in e.machine.get("gpu0", "").split(",")]
    places = {"GPU": 1, "driver": 2, "memory": 3}
    machine = {said: gpu[i] if len(gpu) > i else "unknown" for said, i in places.items()}
    return {"device": record.device, **machine, **software, **threads, **beside}


def place_id(of: Mapping[str, str]) -> str:
    """Return the id of a place in files, 12 hex digits."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def place_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """List the differences of two places, as `key this -> that`."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key} {before.get(key, 'none')} -> {after.get(key, 'none')}" for key in keys]
