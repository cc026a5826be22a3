"""Tables of each Cell's file sizes and energy, and of the GPU's state while the Cell trained."""

from __future__ import annotations

from collections.abc import Iterator

from harness.analysis import measurements
from harness.analysis.run_facts import RunFacts
from harness.records.cost import Checkpoint, GpuState
from harness.records.record import Cell, Measurements, Record
from harness.report import formatting
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Table, column, condensed, measured, table

_OLD = "the Record is older than this measurement"
_HARMLESS = ("idle",)
"""Reasons for a low GPU clock, as the driver names them, that do not affect a measurement."""


def costs(facts: RunFacts) -> Table:
    """Return the table of checkpoint sizes and of the energy of training."""
    columns = [
        column("Adapter's file, MiB", "size of a safetensors file with the adapter and the head; the file was deleted"),
        column("Head in it, MiB", "size of the tensors of the head in that file"),
        column("Whole model, MiB", "computed size of a file with the whole model, merged or fully trained"),
        column("Energy of training, J", "energy of the training phase, by a counter of the driver or the kernel"),
        column("Per 1000 tokens, J", "energy per 1000 tokens without padding"),
    ]
    rows = ((record.cell, [*_sizes(m.checkpoint), *_energy(record, m)]) for record, m in measured(facts))
    return condensed(table(facts, "costs", "Files and energy", columns, rows))


def _sizes(c: Checkpoint | None) -> list[Field]:
    if c is None:
        return [unmeasured(_OLD)] * 3
    if c.adapter_file_B is None:
        return [unmeasured(c.because)] * 2 + [_bytes(c.model_B)]
    return [_bytes(c.adapter_file_B), _bytes(c.head_B), _bytes(c.model_B)]


def _bytes(size: int | None) -> Field:
    if size is None:
        return unmeasured("the driver was not queried")
    return field(formatting.mebibytes(size), size, why=f"{size:,} bytes")


def _energy(record: Record, m: Measurements) -> list[Field]:
    joules = measurements.training_energy(record)
    if joules is None:
        return [unmeasured(_no_energy(record, m))] * 2
    shown = field(f"{joules:,.0f}", joules, why=f"by {m.energy.source}" if m.energy else "")
    tokens = sum(m.training.tokens) if m.training else 0
    if not tokens:
        return [shown, unmeasured("no tokens were counted")]
    each = 1000 * joules / tokens
    return [shown, field(formatting.scientific(each), each)]


def _no_energy(record: Record, m: Measurements) -> str:
    if m.energy is None:
        return _OLD
    if m.training and (shared := measurements.not_its_own_energy(record)):
        return shared
    if not m.energy.source:
        return f"not measured: {m.energy.because}"
    if m.training is None:
        return measurements.why_untrained(record, "energy")
    return "not measured: the phase was under 2 s, or too long for its counter"


def gpus(facts: RunFacts) -> Table:
    """Return the table of the GPU's state in the training phase. Cells on a CPU have no row."""
    columns = [
        column(
            "Reserved peak, MiB", "highest memory that torch's allocator reserved in the training phase, used or not"
        ),
        column("Driver's peak, MiB", "highest memory in use on the whole device, sampled ten times a second"),
        column("Retries", "number of times that the allocator freed its cache and tried again"),
        column("Failed allocations", "number of failed allocations, including those that were caught"),
        column("Clock, MHz", "clock of the processors at the end of training; brackets: at the start"),
        column("Power, W", "power at the end of training; brackets: at the start"),
        column("Temperature, °C", "temperature at the end of training; brackets: at the start"),
        column("Throttled by", "reasons for a lower clock at the start or end of training", number=False),
    ]
    return table(facts, "gpus", "The GPU while training", columns, _gpu_rows(facts))


def _gpu_rows(facts: RunFacts) -> Iterator[tuple[Cell, list[Field]]]:
    for record, _ in measured(facts):
        gpu = measurements.training_gpu(record)
        if gpu is None:
            continue
        edges = (gpu.start, gpu.end)
        yield (
            record.cell,
            [
                _bytes(gpu.reserved_B),
                _bytes(gpu.driver_B),
                *(
                    field(str(n), n) if n is not None else unmeasured("not counted")
                    for n in (gpu.alloc_retries, gpu.ooms)
                ),
                _edges(edges, "sm_clock_Hz", 1e-6),
                _edges(edges, "power_W"),
                _edges(edges, "temperature_C"),
                _throttled(edges),
            ],
        )


def _edges(edges: tuple[GpuState | None, GpuState | None], name: str, scale: float = 1.0) -> Field:
    start, end = (getattr(edge, name, None) for edge in edges)
    if end is None:
        return unmeasured("the driver does not report it")
    before = f"[{start * scale:,.0f}]" if start is not None else ""
    return field(f"{end * scale:,.0f}", end, small=before, more={"start": start} if start is not None else None)


def _throttled(edges: tuple[GpuState | None, GpuState | None]) -> Field:
    reported = [edge.throttle for edge in edges if edge and edge.throttle is not None]
    if not reported:
        return unmeasured("the driver does not report it")
    reasons = list(dict.fromkeys(reason for edge in reported for reason in edge if reason not in _HARMLESS))
    text = ", ".join(reasons) or "nothing"
    return field(text, text, flag="throttled" if reasons else "")
