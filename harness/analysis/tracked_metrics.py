"""What a history keeps of a Record: a few numbers, by name, and where it was made.

step_s, latency_s/<variant>/<kind>/<batch>x<tokens>   medians of raw samples; none where a check or the machine forbids it
training_peak_B                                       the highest memory in training
parameters, weights_B, adapter_B, ...                 counted, not measured: equal on every night unless something changed
counted_peak_B                                        what tensors take at one time in a step: the same, but for 64 KiB
accuracy                                              of the Cell's own seed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from harness.analysis import contention, failed_checks, measurements
from harness.analysis.comparison.baseline_costs import ALLOCATED
from harness.analysis.comparison.baseline_rows import COUNTED_PEAK_B
from harness.records.cost import AT_ONCE
from harness.records.record import Record, Status

STEP, PEAK, ACCURACY, PARAMETERS = "step_s", "training_peak_B", "accuracy", "parameters"
COUNTED_PEAK = "counted_peak_B"
LATENCY = "latency_s"
SENTINEL = f"{LATENCY}/base/"
"""The bare base model, which no adapter's code touches: every Cell with latencies measures it."""
BESIDE = "beside it"
"""The part of a place that says whether other Cells ran at the same time."""
LEDGER = ("weights_B", "adapter_B", "gradients_B", "optimizer_B")
COUNTED = (PARAMETERS, *LEDGER, "adapter_file_B", "model_B", COUNTED_PEAK)
PEAK_BYTES, PEAK_SHARE = 16 * 2**20, 0.01
"""A peak must change by more than both. Training again at another learning rate moved the resident peak of nine Cells on a
CPU by 6.2 MiB at most."""

MetricKind = Literal["timed", "counted", "peak", "score"]


@dataclass(frozen=True)
class TrackedMetrics:
    """What is kept of one Record. values: by metric. untimed: why it has no times, if it has none."""

    values: dict[str, float]
    untimed: str = ""


def kind(metric: str) -> MetricKind | None:
    """Return how a metric is judged, or None for a name that is no metric."""
    if metric == STEP or metric.startswith(f"{LATENCY}/"):
        return "timed"
    if metric in COUNTED:
        return "counted"
    return {PEAK: "peak", ACCURACY: "score"}.get(metric)  # type: ignore[return-value]


def slack(metric: str, level: float) -> float:
    """Return by how much a metric that is no time and no score may differ from its level without having changed."""
    if metric == PEAK:
        return max(PEAK_BYTES, PEAK_SHARE * level)
    return COUNTED_PEAK_B if metric == COUNTED_PEAK else 0


def kept(record: Record) -> TrackedMetrics:
    """Return the numbers of a Record; none of one that is not ok, and no times of a Cell that waited for its CPU."""
    m = record.measurements
    if m is None or record.status is not Status.OK:
        return TrackedMetrics({})
    values: dict[str, float] = {
        PARAMETERS: m.parameters.trainable,
        **{name: getattr(m.memory, name) for name in LEDGER},
    }
    # As allocated on a GPU it is the peak of training itself.
    if m.memory.counted_peak_B is not None and m.memory.source != ALLOCATED:
        values[COUNTED_PEAK] = m.memory.counted_peak_B
    if m.checkpoint is not None:
        values["model_B"] = m.checkpoint.model_B
        if m.checkpoint.adapter_file_B is not None:
            values["adapter_file_B"] = m.checkpoint.adapter_file_B
    if (peak := measurements.training_peak(record)) is not None:
        values[PEAK] = peak
    if m.accuracy is not None:
        values[ACCURACY] = _short(m.accuracy.value)
    untimed = failed_checks.no_speed(record)
    if not untimed and (busy := contention.busy(record)):
        untimed = f"its steps waited for a CPU: {busy}"
    return TrackedMetrics(values if untimed else values | times(record), untimed)


def times(record: Record) -> dict[str, float]:
    """Return the seconds of a Record's steady step and of its latencies, by metric; none of what its check refused."""
    m, found = record.measurements, dict[str, float]()
    if m is None:
        return found
    if m.training is not None and m.training.step_seconds:
        found[STEP] = measurements.step_time(m.training).value
    refused = {"merged": failed_checks.no_merged_speed(record), "multi-adapter": failed_checks.no_mixed_speed(record)}
    for one in m.latency:
        if one.seconds and not refused.get(one.variant):
            beside = "-beside-several" if measurements.beside_several(record.cell, one) else ""
            found[f"{LATENCY}/{one.variant}{beside}/{one.kind}/{one.batch}x{one.tokens}"] = median(one.seconds)
    # A clock that did not move has measured nothing.
    return {name: _short(seconds) for name, seconds in found.items() if seconds > 0}


def _short(value: float) -> float:
    """Keep six digits: a millionth of a time is nobody's finding, and files stay small."""
    return float(f"{value:.6g}")


def sentinel(metric: str, quantization: str) -> bool:
    """Say whether a time is one that no code of a method or an implementation can change: of the bare base, unquantised."""
    return metric.startswith(SENTINEL) and quantization == "none"


def place(record: Record) -> dict[str, str]:
    """Return where a Record was made, as far as its numbers must never be compared with those of another place."""
    e = record.environment
    software = {name: e.software.get(name, "none") for name in ("torch", "triton")}
    beside = {BESIDE: "other Cells"} if any(AT_ONCE in note for note in record.notes) else {}
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
    """Return 12 hex digits that stand for a place in files."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """List what two places differ in, as `key this -> that`."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key} {before.get(key, 'none')} -> {after.get(key, 'none')}" for key in keys]
