"""What a Cell costs, beside what it cost in the baseline: scalars, bytes, files; and its times, which are not judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from harness.analysis import failed_checks
from harness.analysis.comparison.baseline_rows import (
    COUNTED_PEAK_B,
    PROCESS_PEAK_B,
    PROCESS_SHARE,
    TIMES,
    ComparisonRow,
    FindingKind,
    Margins,
    Unit,
)
from harness.analysis.measurements import above_imports, beside_several, step_time, training_peak
from harness.analysis.verdict_kind import VerdictKind
from harness.records.record import Cell, Latency, Measurements, Memory, Record

ALLOCATED = "cuda allocated"
"""Such peaks are exact: a byte more is one."""
PEAK = "training peak above imports"
COUNTED_PEAK = "tensors at one time in a step"
_Numbers = Mapping[str, float | None]


def rows(name: str, base: Record, new: Record, margins: Margins) -> Iterator[ComparisonRow]:
    """Compare two ok Records of one Cell; nothing of Records that hold no measurements."""
    a, b = base.measurements, new.measurements
    if a is None or b is None:
        return
    pair = _Pair(name, base, new)
    yield from counted(name, base, new)
    yield from pair.counted_peak(a.memory, b.memory, margins)
    yield from pair.peak(a.memory.source, b.memory.source, margins)
    before, now = _times(base), _times(new)
    for what in dict.fromkeys([*before, *now]):
        if what in now or failed_checks.no_speed(new):  # that, another row tells
            yield pair.row(FindingKind.TIME, VerdictKind.NOT_RUN, what, TIMES, before.get(what), now.get(what), "s")
        else:
            yield pair.lost_or_new(what, before[what], None, "s")


def counted(name: str, base: Record, new: Record) -> Iterator[ComparisonRow]:
    """Compare what is counted and so exact: parameters, bytes of tensors, sizes of files."""
    a, b = base.measurements, new.measurements
    if a is None or b is None:
        return
    pair = _Pair(name, base, new)
    yield from pair.counts(FindingKind.PARAMETERS, _parameters(a), _parameters(b), "1")
    yield from pair.counts(FindingKind.MEMORY, _counted(a), _counted(b), "B")
    yield from pair.counts(FindingKind.CHECKPOINT, _files(a), _files(b), "B")


class _Pair:
    """Two Records of one Cell, and the rows about them."""

    def __init__(self, name: str, base: Record, new: Record) -> None:
        self.name, self.base, self.new = name, base, new

    def row(
        self,
        kind: FindingKind,
        word: VerdictKind,
        what: str,
        reason: str,
        base: float | None,
        new: float | None,
        unit: Unit,
    ) -> ComparisonRow:
        ids = (self.base.id, self.new.id)
        return ComparisonRow(kind, word, self.name, (self.base.cell_id,), what, reason, base, new, unit, records=ids)

    def counts(self, kind: FindingKind, base: _Numbers, new: _Numbers, unit: Unit) -> Iterator[ComparisonRow]:
        """Compare exactly. A count of scalars may not shrink either: the same recipe would train something else."""
        for what in base:
            a, b = base[what], new[what]
            if a is None and b is None:
                continue
            if a is None or b is None:
                yield self.lost_or_new(what, a, b, unit)
                continue
            bad = a != b if kind is FindingKind.PARAMETERS else b > a
            reason = "" if a == b else "grew" if b > a else "shrank"
            yield self.row(kind, VerdictKind.FAIL if bad else VerdictKind.PASS, what, reason, a, b, unit)

    def counted_peak(self, before: Memory, now: Memory, margins: Margins) -> Iterator[ComparisonRow]:
        """Compare what tensors took at one time in a step, counted on a CPU; on a GPU it is the peak of training itself."""
        a, b = before.counted_peak_B, now.counted_peak_B
        if (a is None and b is None) or ALLOCATED in (before.source, now.source):
            return
        if a is None or b is None:
            yield self.lost_or_new(COUNTED_PEAK, a, b, "B")
            return
        allowed = COUNTED_PEAK_B if margins.memory_B is None else margins.memory_B
        yield self._grown(COUNTED_PEAK, a, b, allowed, "counted")

    def peak(self, before: str, now: str, margins: Margins) -> Iterator[ComparisonRow]:
        """Compare the peaks of training; what was taken in two ways is no pair."""
        a, b = training_peak(self.base), training_peak(self.new)
        if a is None and b is None:
            return
        what = "training peak"
        if before != now:
            reason = f"taken in two ways: {before}, {now}"
            yield self.row(FindingKind.MEMORY, VerdictKind.INCONCLUSIVE, what, reason, a, b, "B")
            return
        if now != ALLOCATED:
            what = PEAK
            a, b = (None if p is None else above_imports(r, p) for r, p in ((self.base, a), (self.new, b)))
        if a is None or b is None:
            yield self.lost_or_new(what, a, b, "B")
            return
        usual = 0 if now == ALLOCATED else max(PROCESS_PEAK_B, int(PROCESS_SHARE * a))
        yield self._grown(what, a, b, usual if margins.memory_B is None else margins.memory_B, now)

    def _grown(self, what: str, a: int, b: int, allowed: int, how: str) -> ComparisonRow:
        grew = b - a
        says = "" if not grew else "grew" if grew > allowed else "shrank" if -grew > allowed else "within the margin"
        reason = f"{says} (margin {allowed:,} B, {how})" if says else ""
        return self.row(
            FindingKind.MEMORY, VerdictKind.FAIL if grew > allowed else VerdictKind.PASS, what, reason, a, b, "B"
        )

    def lost_or_new(self, what: str, base: float | None, new: float | None, unit: Unit) -> ComparisonRow:
        if base is None:
            return self.row(
                FindingKind.NEW, VerdictKind.NOT_RUN, what, "was not measured in the baseline", base, new, unit
            )
        return self.row(
            FindingKind.MISSING, VerdictKind.FAIL, what, "was measured in the baseline, and is not now", base, new, unit
        )


def _parameters(m: Measurements) -> _Numbers:
    p = m.parameters
    return {"adapter parameters": p.adapter, "head parameters": p.head, "all parameters": p.total}


def _counted(m: Measurements) -> _Numbers:
    memory = m.memory
    return {
        "weights": memory.weights_B,
        "adapter": memory.adapter_B,
        "gradients": memory.gradients_B,
        "optimizer": memory.optimizer_B,
        "optimizer on the host": memory.optimizer_host_B,
    }


def _files(m: Measurements) -> _Numbers:
    c = m.checkpoint
    if c is None:
        return dict.fromkeys(("adapter file", "head in it", "whole model"))
    return {"adapter file": c.adapter_file_B, "head in it": c.head_B, "whole model": c.model_B}


def _times(record: Record) -> dict[str, float]:
    """Return the medians of a Record's times; none of a Cell that does not compute what its Method says."""
    m = record.measurements
    if m is None or failed_checks.no_speed(record):
        return {}
    found = {"step": step_time(m.training).value} if m.training and m.training.step_seconds else {}
    return found | {_latency(record.cell, one): median(one.seconds) for one in m.latency if one.seconds}


def _latency(cell: Cell, latency: Latency) -> str:
    several = f" of {latency.adapters}" if latency.variant == "multi-adapter" else ""
    several += " beside several" if beside_several(cell, latency) else ""
    return f"{latency.kind} {latency.variant}{several}, {latency.batch} x {latency.tokens}"
