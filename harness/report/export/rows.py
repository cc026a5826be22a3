"""Rows of the four export tables for one Record, as plain values. A missing value is None."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from harness.analysis import contention, failed_checks, measurements, metrics
from harness.records.cost import Checkpoint, Energy
from harness.records.memory import Memory, Predicted
from harness.records.record import ADAPTER_CONFIG, Environment, Evaluation, Json, Record
from harness.records.training import Training
from harness.report.export.columns import ENVIRONMENT, FAILURE, GPU_EDGES, GPU_PHASE, GPU_STATE, SOFTWARE

Value = bool | int | float | str | None
ExportRow = dict[str, Value]


def key(record: Record) -> ExportRow:
    """Return the key columns, which are equal in all rows of one attempt."""
    return {"run": record.run, "cell_id": record.cell_id, "attempt": record.attempt}


def cell(record: Record, label: str, *, latest: bool) -> ExportRow:
    """Return the row of one attempt for the table `cells`. latest: True for the last attempt at the Cell."""
    it = record.cell
    keys = it.config.get(ADAPTER_CONFIG)
    rank = keys.get("r") if isinstance(keys, dict) else it.config.get("rank")
    return {
        **key(record),
        "latest": latest,
        "status": record.status.value,
        "because": record.because,
        "label": label,
        **_fields("", it, ("model", "task", "method", "implementation", "environment", "serve")),
        **_fields("", it, ("optimizer", "dtype", "seed")),
        "provider": getattr(record.provider, "distribution", None),
        "provider_version": getattr(record.provider, "version", None),
        "base": it.base.quantization,
        "base_implementation": it.base.implementation,
        "device": record.device,
        "rank": rank if isinstance(rank, int) and not isinstance(rank, bool) else None,
        **{f"config.{name}": _plain(value) for name, value in it.config.items()},
        **_fields("training.", it.training, Training.model_fields),
        **_fields("evaluation.", it.evaluation, Evaluation.model_fields),
        **_measured(record),
        **{metric.column: metric.value(record) for metric in metrics.METRICS if metric.column},
        "gate_record": record.gate.record if record.gate else None,
        "notes": json.dumps(record.notes, ensure_ascii=False) if record.notes else None,
        "started": record.started,
        **_phases(record),
        **_gpu(record),
        **_fields("failure.", record.failure, FAILURE),
        **_environment(record.environment),
    }


def _fields(prefix: str, part: object, names: Iterable[str]) -> ExportRow:
    """Return the fields `names` of a part of the Record as columns. If the part is missing, all values are None."""
    return {f"{prefix}{name}": getattr(part, name, None) for name in names}


def samples(record: Record) -> Iterator[ExportRow]:
    """Yield one row per raw sample: first of the training, then of the latencies, then of the model server."""
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

    yield from _served(record)


def _served(record: Record) -> Iterator[ExportRow]:
    """Yield one row per raw sample of a server. Its column `kind` is `served_` and the name of the sample."""
    served = record.measurements.served if record.measurements else None
    if served is None:
        return
    found = [
        (kind, times.load, times.requests, times.tokens, times.adapters, values)
        for times in served.times
        for kind, values in (
            ("first_token", times.first_token_s), ("token", times.token_s), ("round", times.round_s),
        )
    ]  # fmt: skip
    swaps: tuple[str, None, None, None, None, list[float]] = ("swap", None, None, None, None, served.swap_s)
    for kind, load, requests, tokens, adapters, values in (*found, swaps):
        for index, value in enumerate(values):
            yield {
                **key(record), "kind": f"served_{kind}", "variant": load, "latency_batch": requests,
                "latency_tokens": tokens, "latency_adapters": adapters, "index": index, "value": value, "unit": "s",
                "warmup": False, "no_speed": failed_checks.no_speed(record),
            }  # fmt: skip


def items(record: Record) -> Iterator[ExportRow]:
    """Yield one row per scored test item."""
    for index, item in enumerate(record.accuracy.items if record.accuracy else ()):
        yield {**key(record), "task": record.cell.task, "index": index, "item": item.id, "correct": item.correct}


def checks(record: Record) -> Iterator[ExportRow]:
    """Yield one row per check."""
    from_another = record.gate.checks if record.gate and record.gate.record else 0
    for number, check in enumerate(record.checks):
        yield {**key(record), **check.model_dump(mode="json"), "shared": number < from_another}


def _plain(value: Json) -> Value:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _measured(record: Record) -> ExportRow:
    """Return the columns of accuracy, memory, files, energy and training details. If a check failed, times are None."""
    m, a = record.measurements, record.accuracy
    no_speed = failed_checks.no_speed(record)
    timed = measurements.timed_training(record) if not no_speed else None
    step = measurements.step_time(timed) if timed else None
    return {
        **_fields("accuracy_", a, ("low", "high", "metric", "interval")),
        "accuracy_n": len(a.items) if a else None,
        **_fields("", a, ("scored_by", "cut_items")),
        **_fields("memory.", m and m.memory, (name for name in Memory.model_fields if name != "predicted")),
        **_fields("memory.predicted.", m and m.memory.predicted, Predicted.model_fields),
        **_fields("checkpoint.", m and m.checkpoint, Checkpoint.model_fields),
        **_fields("energy.", m and m.energy, Energy.model_fields),
        **_fields("", record.training, ("text_rules", "cut_examples")),
        "step_low_s": step.low if step else None,
        "step_high_s": step.high if step else None,
        "step_n": step.count if step else None,
        "no_speed": no_speed,
        "busy": contention.busy(record),
        "unsteady": contention.unsteady(record),
    }


def _phases(record: Record) -> ExportRow:
    """Return the time, the peak memory and the energy of every phase.

    The energy is left out if it includes the energy of other Cells. For a repeated phase, times and energies are
    summed, and the highest peak is used.
    """
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
    found = _fields("gpu.", gpu, GPU_PHASE)
    for edge in GPU_EDGES:
        found |= _fields(f"gpu.{edge}.", getattr(gpu, edge, None), GPU_STATE)
    return {name: ", ".join(value) if isinstance(value, list) else value for name, value in found.items()}


def _environment(e: Environment) -> ExportRow:
    found: ExportRow = {
        **{name: e.software.get(name) for name in SOFTWARE},
        **{name: e.machine.get(name) for name in ("os", "cpu")},
        "cores": _count(e.machine, "cores"),
        "memory_B": _count(e.machine, "memory_B"),
        "gpu": e.machine.get("gpu0"),
        **_fields("", e, ENVIRONMENT),
    }
    return {f"environment.{name}": value for name, value in found.items()}


def _count(machine: Mapping[str, str], name: str) -> int | None:
    value = machine.get(name, "")
    return int(value) if value.isdecimal() else None
