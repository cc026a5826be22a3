"""Values of a Record that the history of nightly runs stores, and the Record's place: its machine and software.

The history stores each metric of `metrics.METRICS` that has a name in the history. It also stores the median of each
latency, under the name `latency_s/<variant>/<kind>/<batch>x<tokens>`.
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
"""Start of the names of latencies of the bare base model. No adapter changes these latencies, and every Cell that
measures latencies has them."""
CONCURRENT = "beside it"
"""Key that the dict returned by `place` has only if other Cells ran at the same time."""


@dataclass(frozen=True)
class TrackedMetrics:
    """Values of one Record that the history of nightly runs stores."""

    values: dict[str, float]
    """Name of the metric in the history -> value."""
    untimed: str = ""
    """Reason why `values` has no times; empty if times are allowed."""


def kind(metric: str) -> MetricKind | None:
    """Return the rule by which a metric is judged. If no metric has this name, return None."""
    if metric.startswith(f"{LATENCY}/"):
        return "timed"
    declared = metrics.in_history(metric)
    return declared.kind if declared else None


def names() -> list[str]:
    """Return the names of all metrics in the history. The single name `latency_s` stands for all latencies."""
    return [LATENCY, *(metric.history for metric in metrics.METRICS if metric.history)]


def slack(metric: str, level: float) -> float:
    """Return the largest difference from `level` that does not count as a change of a metric.

    metric: a name in the history, but not of a time or a score.
    """
    declared = metrics.in_history(metric)
    return max(declared.slack_B, declared.slack_share * level) if declared else 0


def got_worse(metric: str, old: float, new: float) -> bool:
    """Return whether a change of a metric is a regression. The metric must not be a time or a score."""
    declared = metrics.in_history(metric)
    return declared.got_worse(old, new) if declared else new > old


def tracked(record: Record) -> TrackedMetrics:
    """Return the values of a Record that the history stores. A Record that is not ok has none.

    Times are left out if a failed check forbids showing them (`failed_checks.no_speed`), or if the steps or passes
    waited for a CPU.
    """
    if record.measurements is None or record.status is not Status.OK:
        return TrackedMetrics({})
    values: dict[str, float] = {}
    for metric in metrics.METRICS:
        is_tracked = metric.history and metric.kind != "timed" and metric.applies(record)
        if is_tracked and (value := metric.read(record)) is not None:
            values[metric.history] = _short(value) if metric.kind == "score" else value
    untimed = failed_checks.no_speed(record)
    if not untimed and (busy := contention.busy(record)):
        untimed = f"its {'steps' if record.training else 'passes'} waited for a CPU: {busy}"
    return TrackedMetrics(values if untimed else values | times(record), untimed)


def times(record: Record) -> dict[str, float]:
    """Return name of a metric -> seconds, for the time of a steady step and the latencies of a Record.

    Latencies that a failed check hides are left out.
    """
    m = record.measurements
    if m is None:
        return {}
    timed = (metric for metric in metrics.METRICS if metric.history and metric.kind == "timed")
    found = {metric.history: value for metric in timed if (value := metric.read(record)) is not None}
    refused = {"merged": failed_checks.no_merged_speed(record), "multi-adapter": failed_checks.no_mixed_speed(record)}
    for one in m.latency:
        if one.seconds and not refused.get(one.variant):
            suffix = "-beside-several" if measurements.is_reference_for_several_adapters(record.cell, one) else ""
            found[f"{LATENCY}/{one.variant}{suffix}/{one.kind}/{one.batch}x{one.tokens}"] = median(one.seconds)
    # A time of 0 is no measurement: the clock did not move.
    return {name: _short(seconds) for name, seconds in found.items() if seconds > 0}


def _short(value: float) -> float:
    """Round a value to six significant digits. Smaller differences do not matter, and files stay small."""
    return float(f"{value:.6g}")


def sentinel(metric: str, quantization: str) -> bool:
    """Return whether a metric is a time of the bare, unquantised base model.

    No Method and no implementation can change such a time. quantization: the quantization of the Cell's base.
    """
    return metric.startswith(SENTINEL) and quantization == "none"


def place(record: Record) -> dict[str, str]:
    """Return the place of a Record: the facts about machine and software that two Records must share to be compared."""
    e = record.environment
    software = {name: e.software.get(name, "none") for name in ("torch", "triton")}
    shared = software | {"threads": str(e.threads or "unknown")}
    if concurrent_cells(record) > 1:
        shared[CONCURRENT] = "other Cells"
    if record.device in ("", "cpu"):
        keys = {"CPU": "cpu", "architecture": "architecture", "cores": "cores"}
        return {"device": "cpu", **{name: e.machine.get(key, "unknown") for name, key in keys.items()}, **shared}
    # The text has uuid, name, driver and memory. Another card of the same model is the same place.
    gpu = [part.strip() for part in e.machine.get("gpu0", "").split(",")]
    positions = {"GPU": 1, "driver": 2, "memory": 3}
    machine = {name: gpu[i] if len(gpu) > i else "unknown" for name, i in positions.items()}
    return {"device": record.device, **machine, **shared}


def place_id(of: Mapping[str, str]) -> str:
    """Return the id that stands for a place in files: 12 hex digits."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def place_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """List the differences between two places, each as `key old -> new`."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key} {before.get(key, 'none')} -> {after.get(key, 'none')}" for key in keys]
