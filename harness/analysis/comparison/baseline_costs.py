"""Costs of a Cell compared with the baseline: scalars, bytes, files; times are shown and not judged."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from harness.analysis import failed_checks, metrics
from harness.analysis.comparison.baseline_rows import (
    PROCESS_PEAK_B,
    PROCESS_SHARE,
    TIMES,
    ComparisonRow,
    FindingKind,
    Margins,
    Unit,
)
from harness.analysis.measurements import above_imports, beside_several, training_peak
from harness.analysis.metrics import TRAINING_PEAK, Metric
from harness.analysis.verdict_kind import VerdictKind
from harness.records.memory import ALLOCATED
from harness.records.record import Cell, Latency, Record

PEAK = "training peak above imports"


def rows(name: str, base: Record, new: Record, margins: Margins) -> Iterator[ComparisonRow]:
    """Compare two ok Records of one Cell by every metric of the gate; nothing of Records without measurements."""
    if base.measurements is None or new.measurements is None:
        return
    pair = _Pair(name, base, new)
    yield from counted(name, base, new)
    for metric in metrics.METRICS:
        if metric is TRAINING_PEAK:
            yield from pair.peak(base.measurements.memory.source, new.measurements.memory.source, margins)
        elif metric.quantity and (metric.slack_B or metric.kind == "peak"):
            yield from pair.within_slack(metric, margins)
    before, now = _times(base), _times(new)
    for what in dict.fromkeys([*before, *now]):
        if what in now or failed_checks.no_speed(new):  # a failed check has a separate row
            yield pair.row(FindingKind.TIME, VerdictKind.NOT_RUN, what, TIMES, before.get(what), now.get(what), "s")
        else:
            yield pair.missing_or_new(what, before[what], None, "s")


def counted(name: str, base: Record, new: Record) -> Iterator[ComparisonRow]:
    """Compare the counted, and so exact, metrics: parameters, bytes of tensors, sizes of files."""
    if base.measurements is None or new.measurements is None:
        return
    pair = _Pair(name, base, new)
    for metric in metrics.METRICS:
        if metric.quantity and metric.kind == "counted" and not metric.slack_B:
            yield from pair.exact(metric)


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

    def exact(self, metric: Metric) -> Iterator[ComparisonRow]:
        """Compare without a margin. A count of scalars may not shrink either: the same recipe would train something else."""
        a, b = metric.read(self.base), metric.read(self.new)
        if a is None and b is None:
            return
        if a is None or b is None:
            yield self.missing_or_new(metric.quantity, a, b, metric.unit)
            return
        reason = "" if a == b else "grew" if b > a else "shrank"
        word = VerdictKind.FAIL if metric.got_worse(a, b) else VerdictKind.PASS
        yield self.row(metric.finding, word, metric.quantity, reason, a, b, metric.unit)

    def within_slack(self, metric: Metric, margins: Margins) -> Iterator[ComparisonRow]:
        """Compare with the metric's margin in bytes; nothing where it does not apply to both."""
        a, b = metric.read(self.base), metric.read(self.new)
        if (a is None and b is None) or not (metric.applies(self.base) and metric.applies(self.new)):
            return
        if a is None or b is None:
            yield self.missing_or_new(metric.quantity, a, b, metric.unit)
            return
        allowed = metric.slack_B if margins.memory_B is None else margins.memory_B
        yield self._grown(metric.quantity, a, b, allowed, "counted" if metric.kind == "counted" else "measured")

    def peak(self, before: str, now: str, margins: Margins) -> Iterator[ComparisonRow]:
        """Compare the peaks of training; peaks from two sources do not compare."""
        a, b = training_peak(self.base), training_peak(self.new)
        if a is None and b is None:
            return
        what = TRAINING_PEAK.quantity
        if before != now:
            reason = f"taken in two ways: {before}, {now}"
            yield self.row(FindingKind.MEMORY, VerdictKind.INCONCLUSIVE, what, reason, a, b, "B")
            return
        if now != ALLOCATED:
            what = PEAK
            a, b = (None if p is None else above_imports(r, p) for r, p in ((self.base, a), (self.new, b)))
        if a is None or b is None:
            yield self.missing_or_new(what, a, b, "B")
            return
        usual = 0 if now == ALLOCATED else max(PROCESS_PEAK_B, int(PROCESS_SHARE * a))
        yield self._grown(what, a, b, usual if margins.memory_B is None else margins.memory_B, now)

    def _grown(self, what: str, a: float, b: float, allowed: int, how: str) -> ComparisonRow:
        grew = b - a
        says = "" if not grew else "grew" if grew > allowed else "shrank" if -grew > allowed else "within the margin"
        reason = f"{says} (margin {allowed:,} B, {how})" if says else ""
        return self.row(
            FindingKind.MEMORY, VerdictKind.FAIL if grew > allowed else VerdictKind.PASS, what, reason, a, b, "B"
        )

    def missing_or_new(self, what: str, base: float | None, new: float | None, unit: Unit) -> ComparisonRow:
        if base is None:
            return self.row(
                FindingKind.NEW, VerdictKind.NOT_RUN, what, "was not measured in the baseline", base, new, unit
            )
        return self.row(
            FindingKind.MISSING, VerdictKind.FAIL, what, "was measured in the baseline, and is not now", base, new, unit
        )


def _times(record: Record) -> dict[str, float]:
    """Return the medians of a Record's times, by quantity; none of a Cell that failed a check."""
    m = record.measurements
    if m is None or failed_checks.no_speed(record):
        return {}
    timed = (metric for metric in metrics.METRICS if metric.quantity and metric.kind == "timed")
    found = {metric.quantity: value for metric in timed if (value := metric.read(record)) is not None}
    return found | {_latency(record.cell, one): median(one.seconds) for one in m.latency if one.seconds}


def _latency(cell: Cell, latency: Latency) -> str:
    several = f" of {latency.adapters}" if latency.variant == "multi-adapter" else ""
    several += " beside several" if beside_several(cell, latency) else ""
    return f"{latency.kind} {latency.variant}{several}, {latency.batch} x {latency.tokens}"
