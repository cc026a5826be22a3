"""Rows of the four export tables for one Record: plain values, None where missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from harness.analysis import contention, failed_checks, measurements, metrics
from harness.records.cost import Checkpoint, Energy
from harness.records.record import ADAPTER_CONFIG, Environment, Json, Measurements, Memory, Predicted, Record
from harness.report.export.columns import GPU_EDGES, GPU_PHASE, GPU_STATE

Value = bool | int | float | str | None
ExportRow = dict[str, Value]


def key(record: Record) -> ExportRow:
    """Return the key columns of the rows of one attempt."""
    return {"run": record.run, "cell_id": record.cell_id, "attempt": record.attempt}


def cell(record: Record, label: str, *, latest: bool) -> ExportRow:
    """Return the one row of an attempt."""
    asked, failure = record.cell, record.failure
    keys = asked.config.get(ADAPTER_CONFIG)
    rank = keys.get("r") if isinstance(keys, dict) else asked.config.get("rank")
    return {
        **key(record),
        "latest": latest,
        "status": record.status.value,
        "because": record.because,
        "label": label,
        **{name: getattr(asked, name) for name in ("model", "task", "method", "implementation")},
        "provider": record.provider.distribution if record.provider else None,
        "provider_version": record.provider.version if record.provider else None,
        "base": asked.base.quantization,
        "base_implementation": asked.base.implementation,
        **{name: getattr(asked, name) for name in ("optimizer", "dtype", "seed")},
        "device": record.device,
        "rank": rank if isinstance(rank, int) and not isinstance(rank, bool) else None,
        **{f"config.{name}": _plain(value) for name, value in asked.config.items()},
        **{f"training.{name}": value for name, value in asked.training.model_dump().items()},
        **{f"evaluation.{name}": value for name, value in asked.evaluation.model_dump().items()},
        **_measured(record.measurements),
        **_of_training(record),
        **{metric.column: metric.value(record) for metric in metrics.METRICS if metric.column},
        "notes": json.dumps(record.notes, ensure_ascii=False) if record.notes else None,
        "started": record.started,
        **_phases(record),
        **_gpu(record),
        "failure.kind": failure.kind if failure else None,
        "failure.message": failure.message if failure else None,
        "failure.phase": failure.phase if failure else None,
        "failure.requested_B": failure.requested_B if failure else None,
        "failure.last_peak_B": failure.last_peak_B if failure else None,
        **_environment(record.environment),
    }


def samples(record: Record) -> Iterator[ExportRow]:
    """Yield a row per raw sample: of training, then of latency."""
    m = record.measurements
    if m is None:
        return
    no_speed = failed_checks.no_speed(record)
    if (t := m.training) is not None:
        steady = measurements.steady(t).start
        for kind in ("step_seconds", "losses", "gradient_norms", "tokens", "padded_tokens"):
            timed = kind == "step_seconds"
            for index, value in enumerate(getattr(t, kind)):
                yield {
                    **key(record), "kind": kind, "variant": None, "latency_batch": None, "latency_tokens": None,
                    "latency_adapters": None, "index": index, "value": value, "unit": "s" if timed else "1",
                    "warmup": index < steady, "no_speed": no_speed if timed else None,
                }  # fmt: skip
    refused = {
        "base": "", "unmerged": no_speed, "merged": failed_checks.no_merged_speed(record),
        "multi-adapter": failed_checks.no_mixed_speed(record),
    }  # fmt: skip
    for latency in m.latency:
        for index, value in enumerate(latency.seconds):
            yield {
                **key(record), "kind": f"latency_{latency.kind}", "variant": latency.variant,
                "latency_batch": latency.batch, "latency_tokens": latency.tokens, "latency_adapters": latency.adapters,
                "index": index, "value": value, "unit": "s", "warmup": False, "no_speed": refused[latency.variant],
            }  # fmt: skip


def items(record: Record) -> Iterator[ExportRow]:
    """Yield a row per scored test item."""
    accuracy = record.measurements.accuracy if record.measurements else None
    for index, item in enumerate(accuracy.items if accuracy else ()):
        yield {**key(record), "task": record.cell.task, "index": index, "item": item.id, "correct": item.correct}


def checks(record: Record) -> Iterator[ExportRow]:
    """Yield a row per check."""
    for check in record.checks:
        yield {**key(record), **check.model_dump(mode="json")}


def _plain(value: Json) -> Value:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _measured(m: Measurements | None) -> ExportRow:
    a = m.accuracy if m else None
    found: ExportRow = {
        "accuracy_low": a.low if a else None,
        "accuracy_high": a.high if a else None,
        "accuracy_n": len(a.items) if a else None,
        "accuracy_metric": a.metric if a else None,
        "accuracy_interval": a.interval if a else None,
        "scored_by": a.scored_by if a else None,
        "cut_items": a.cut_items if a else None,
    }
    for part, model in (("memory", Memory), ("checkpoint", Checkpoint), ("energy", Energy)):
        has = getattr(m, part) if m else None
        for name in model.model_fields:
            if name != "predicted":
                found[f"{part}.{name}"] = getattr(has, name) if has else None
    predicted = m.memory.predicted if m else None
    for name in Predicted.model_fields:
        found[f"memory.predicted.{name}"] = getattr(predicted, name) if predicted else None
    return found


def _of_training(record: Record) -> ExportRow:
    """Return the details of the training's speed; none if a check failed, as in the report."""
    t = record.measurements.training if record.measurements else None
    no_speed = failed_checks.no_speed(record)
    timed = t if t and t.step_seconds and not no_speed else None
    step = measurements.step_time(timed) if timed else None
    return {
        "text_rules": t.text_rules if t else None,
        "cut_examples": t.cut_examples if t else None,
        "step_low_s": step.low if step else None,
        "step_high_s": step.high if step else None,
        "step_n": step.count if step else None,
        "no_speed": no_speed,
        "busy": contention.busy(record),
    }


def _phases(record: Record) -> ExportRow:
    """Return time, peak and own joules of every phase; for a repeated phase the sums and the higher peak."""
    found: dict[str, float] = {}
    own_energy = not measurements.not_its_own_energy(record)
    for phase in record.phases:
        name = f"phase_s.{phase.name}"
        found[name] = found.get(name, 0.0) + phase.seconds
        if phase.peak_memory_B is not None:
            name = f"phase_peak_B.{phase.name}"
            found[name] = max(found.get(name, 0), phase.peak_memory_B)
        if phase.energy_J is not None and own_energy:
            name = f"phase_energy_J.{phase.name}"
            found[name] = found.get(name, 0.0) + phase.energy_J
    return dict(found)


def _gpu(record: Record) -> ExportRow:
    """Return the GPU columns of the training phase."""
    gpu = measurements.training_gpu(record)
    found: ExportRow = {f"gpu.{name}": getattr(gpu, name, None) for name in GPU_PHASE}
    for edge in GPU_EDGES:
        state = getattr(gpu, edge, None)
        for name in GPU_STATE:
            value = getattr(state, name, None)
            found[f"gpu.{edge}.{name}"] = ", ".join(value) if isinstance(value, list) else value
    return found


def _environment(e: Environment) -> ExportRow:
    found: ExportRow = {
        "id": e.id,
        **{name: e.software.get(name) for name in ("python", "torch", "transformers")},
        **{name: e.machine.get(name) for name in ("os", "cpu")},
        "cores": _count(e.machine, "cores"),
        "memory_B": _count(e.machine, "memory_B"),
        "gpu": e.machine.get("gpu0"),
        **{name: getattr(e, name) for name in ("threads", "code_version", "git_sha", "git_dirty")},
    }
    return {f"environment.{name}": value for name, value in found.items()}


def _count(machine: Mapping[str, str], name: str) -> int | None:
    value = machine.get(name, "")
    return int(value) if value.isdecimal() else None
