"""Numbers derived from one Record's raw samples: throughput, step time, training peak, energy."""

from __future__ import annotations

from harness.analysis.statistics.intervals import Median, median_interval
from harness.records.cost import GpuPhase
from harness.records.notes import concurrent_cells
from harness.records.record import Cell, Latency, Record, TrainingMeasured
from harness.records.served import Load, ServedTimes

STARTUP = "start-up"
"""Name of the phase from the start of the process to the first work on the Cell."""
TRAIN, EVALUATE, LATENCY_PHASE = "train", "evaluate", "latency"
_WHOLE_MACHINE = "rapl"


def steady(training: TrainingMeasured) -> slice:
    """Return a slice that selects the steady steps, which follow the warm-up.

    If the run was no longer than its warm-up, the slice selects all steps.
    """
    return slice(training.timing_warmup if training.timing_warmup < len(training.step_seconds) else 0, None)


def step_time(training: TrainingMeasured) -> Median:
    """Return the median time of a steady step in seconds, with its interval."""
    return median_interval(training.step_seconds[steady(training)])


def timed_training(record: Record) -> TrainingMeasured | None:
    """Return the training measurements of a Record; None if no step was timed."""
    return record.training if record.training and record.training.step_seconds else None


def why_untrained(record: Record, fact: str) -> str:
    """Return the reason why a Record without timed steps lacks a fact about its training.

    fact: name of the fact, e.g. `peak memory`. If the training was imported, `Imported.unknown` may give the reason.
    """
    if record.imported is None:
        return "not trained"
    return f"not known of the imported training: {record.imported.unknown.get(fact, 'it was not measured here')}"


def step_seconds(record: Record) -> float | None:
    """Return the median time of a steady step, in seconds; None if no step was timed."""
    training = timed_training(record)
    return step_time(training).value if training else None


def step_rate(training: TrainingMeasured) -> Median | None:
    """Return the tokens per second of a steady step: the median over the steps, with its interval.

    Padding is not counted. If a step took no measurable time, return None.
    """
    seconds, tokens = training.step_seconds[steady(training)], training.tokens[steady(training)]
    return median_interval([t / s for t, s in zip(tokens, seconds, strict=True)]) if min(seconds) > 0 else None


def throughput(training: TrainingMeasured) -> float | None:
    """Return the tokens per second over all steady steps together. Padding is not counted.

    If the steps took no measurable time, return None.
    """
    seconds = sum(training.step_seconds[steady(training)])
    return sum(training.tokens[steady(training)]) / seconds if seconds > 0 else None


def is_reference_for_several_adapters(cell: Cell, latency: Latency) -> bool:
    """Return whether a latency was timed only for comparison with batches that mix several adapters.

    Such a latency uses one adapter and the batch size that the suite requests.
    """
    return latency.adapters == 1 and latency.batch == cell.evaluation.prompt_batch


def served_times(record: Record, load: Load, *, alone: bool) -> ServedTimes | None:
    """Return the times of a Cell's server under one load; None if the load was not timed.

    load: the models that the requests name. alone: True for one request at a time, False for several at a time.
    """
    served = record.measurements.served if record.measurements else None
    found = served.times if served else []
    return next((t for t in found if t.load == load and (t.requests == 1) is alone and t.round_s), None)


def served_rate(times: ServedTimes) -> Median | None:
    """Return the tokens that a server generates per second, as the median over the timed rounds, with its interval.

    A round sends all of its requests at the same time. If a round took no measurable time, return None.
    """
    tokens = times.requests * times.tokens
    return median_interval([tokens / s for s in times.round_s]) if times.round_s and min(times.round_s) > 0 else None


def training_peak(record: Record) -> int | None:
    """Return the highest memory in the training phase, in bytes.

    If there was no training, or if memory was not measured, return None.
    """
    peaks = [p.peak_memory_B for p in record.phases if p.name == TRAIN]
    return max((peak for peak in peaks if peak is not None), default=None)


def training_energy(record: Record) -> float | None:
    """Return the energy of the training phase, in joules.

    Return None if there was no training or no energy counter, or if the counter includes the energy of other Cells.
    """
    if not_its_own_energy(record):
        return None
    found = [p.energy_J for p in record.phases if p.name == TRAIN and p.energy_J is not None]
    return sum(found) if found else None


def not_its_own_energy(record: Record) -> str:
    """Return the reason why the measured energy of a Record includes the energy of other Cells.

    If the counter does not cover the whole machine, or the Cell ran alone, return an empty string.
    """
    energy = record.measurements.energy if record.measurements else None
    # A failed Record does not name its counter; on a CPU there is only one.
    counter = energy.source if energy else _WHOLE_MACHINE if record.device in ("", "cpu") else ""
    cells = concurrent_cells(record)
    shared = cells > 1 and counter == _WHOLE_MACHINE
    return f"the counter ({counter}) covers the whole machine, where up to {cells} Cells ran at once" if shared else ""


def training_gpu(record: Record) -> GpuPhase | None:
    """Return the state of the GPU in the training phase; None without a GPU or training."""
    return next((p.gpu for p in record.phases if p.name == TRAIN and p.gpu), None)


def above_imports(record: Record, memory: int) -> int:
    """Return `memory` minus the memory of the process after its imports, in bytes. The result is at least 0.

    The imported libraries are not a cost of the Method.
    """
    if record.measurements is not None:
        return max(0, memory - record.measurements.memory.baseline_B)
    started = [p.end_memory_B for p in record.phases if p.name == STARTUP and p.end_memory_B is not None]
    return max(0, memory - (started[0] if started else 0))


def startup_seconds(record: Record) -> float:
    """Return the seconds of the start-up phase.

    They include the start of the interpreter and the imports. A forked process has neither; see `Record.start`.
    """
    return sum(p.seconds for p in record.phases if p.name == STARTUP)


def unaccounted_seconds(record: Record) -> float:
    """Return the seconds of the Cell's duration that belong to none of its phases."""
    return max(0.0, record.duration_s - sum(p.seconds for p in record.phases))
