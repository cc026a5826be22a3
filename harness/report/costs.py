"""Tables of other costs of a Cell: files, energy, state of the GPU."""

from __future__ import annotations

from harness.analysis import measurements as measured
from harness.analysis.run_facts import RunFacts
from harness.records.cost import Checkpoint, Energy, GpuState
from harness.records.record import Measurements, Record
from harness.report import formatting
from harness.report.formatting import Figure, figure, unmeasured
from harness.report.table_model import Table, column, measurements, table

_OLD = "the Record is from before this was measured"
_QUIET = {"idle"}
"""Reasons for a low clock that do not affect a measurement."""


def costs(facts: RunFacts) -> Table:
    """Tabulate checkpoint sizes and the energy of training."""
    columns = [
        column("Adapter's file, MiB", "a safetensors file with the adapter and the head: written, looked at, removed"),
        column("Head in it, MiB", "of that, the tensors of the head"),
        column("Whole model, MiB", "its tensors as saved when merged or fully trained: summed up, no file was written"),
        column("Energy of training, J", "of the training phase, by a counter of the driver or the kernel"),
        column("Per 1000 tokens, J", "of real tokens, padding not counted"),
    ]
    rows = [
        {"cell": cell, "figures": [*_sizes(m.checkpoint), *_energy(facts.latest[cell.cell_id], m)]}
        for cell, m in measurements(facts)
    ]
    return table(facts, "costs", "Files and energy", columns, rows)


def _sizes(c: Checkpoint | None) -> list[Figure]:
    if c is None:
        return [unmeasured(_OLD)] * 3
    whole = _bytes(c.model_B)
    if c.adapter_file_B is None:
        return [unmeasured(c.because)] * 2 + [whole]
    return [_bytes(c.adapter_file_B), _bytes(c.head_B), whole]


def _bytes(size: int) -> Figure:
    return figure(formatting.mebibytes(size), size, why=f"{size:,} bytes")


def _energy(record: Record, m: Measurements) -> list[Figure]:
    spent = measured.training_energy(record)
    if spent is None:
        shared = measured.not_its_own_energy(record) if m.energy and m.training else ""
        return [unmeasured(shared or _no_energy(m.energy, m.training is not None))] * 2
    shown = figure(f"{spent:,.0f}", spent, why=f"by {m.energy.source}" if m.energy else "")
    tokens = sum(m.training.tokens) if m.training else 0
    if not tokens:
        return [shown, unmeasured("no tokens were counted")]
    each = 1000 * spent / tokens
    return [shown, figure(formatting.scientific(each), each)]


def _no_energy(energy: Energy | None, trained: bool) -> str:
    if energy is None:
        return _OLD
    if not energy.source:
        return f"not measured: {energy.because}"
    return "not measured: the phase was under 2 s, or too long for its counter" if trained else "not trained"


def gpus(facts: RunFacts) -> Table:
    """Tabulate the state of the GPU in the training phase; no rows for runs on a CPU."""
    columns = [
        column("Reserved peak, MiB", "highest memory that torch's allocator held in the training phase, used or not"),
        column("Driver's peak, MiB", "highest memory in use on the whole device, sampled ten times a second"),
        column("Retries", "times that the allocator freed its cache and tried again"),
        column("Failed allocations", "allocations that failed, also those that were caught"),
        column("Clock, MHz", "of its processors, as training ended; as it started in the brackets"),
        column("Power, W", "the same"),
        column("Temperature, °C", "the same"),
        column("Throttled by", "why its clocks were not higher, at either edge of training", number=False),
    ]
    rows = []
    for cell, _ in measurements(facts):
        gpu = measured.training_gpu(facts.latest[cell.cell_id])
        if gpu is None:
            continue
        sizes = [gpu.reserved_B, gpu.driver_B]
        counts = [gpu.alloc_retries, gpu.ooms]
        edges = (gpu.start, gpu.end)
        figures = [
            *(_bytes(size) if size is not None else unmeasured("the driver was not queried") for size in sizes),
            *(figure(str(n), n) if n is not None else unmeasured("not counted") for n in counts),
            _edges(edges, "sm_clock_Hz", 1e-6),
            _edges(edges, "power_W"),
            _edges(edges, "temperature_C"),
            _throttled(edges),
        ]
        rows.append({"cell": cell, "figures": figures})
    return table(facts, "gpus", "The GPU while training", columns, rows)


def _edges(edges: tuple[GpuState | None, GpuState | None], name: str, scale: float = 1.0) -> Figure:
    start, end = (getattr(edge, name, None) for edge in edges)
    if end is None:
        return unmeasured("the driver does not report it")
    before = f"[{start * scale:,.0f}]" if start is not None else ""
    return figure(f"{end * scale:,.0f}", end, small=before)


def _throttled(edges: tuple[GpuState | None, GpuState | None]) -> Figure:
    reported = [edge.throttle for edge in edges if edge and edge.throttle is not None]
    if not reported:
        return unmeasured("the driver does not report it")
    reasons = list(dict.fromkeys(reason for edge in reported for reason in edge if reason not in _QUIET))
    return figure(", ".join(reasons) or "nothing", ", ".join(reasons) or "nothing", flag="throttled" if reasons else "")
