"""Compare the costs and the training loss of a Cell with the baseline. Times are shown, but not judged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from harness.analysis import failed_checks, metrics
from harness.analysis.comparison.baseline_rows import (
    LOSS,
    LOSS_SHARE,
    PROCESS_PEAK_B,
    PROCESS_SHARE,
    TIMES,
    ComparisonRow,
    Margins,
    RecordPair,
    RowKind,
    Unit,
)
from harness.analysis.measurements import above_imports, is_reference_for_several_adapters, training_peak
from harness.analysis.metrics import TRAINING_PEAK, Number
from harness.analysis.verdict_kind import VerdictKind
from harness.records.memory import ALLOCATED
from harness.records.record import Cell, Latency, Record

PEAK = "training peak above imports"


def rows(pair: RecordPair, margins: Margins) -> Iterator[ComparisonRow]:
    """Yield all rows on the costs and the training loss of one Cell. Both of its Records must have measurements."""
    yield from counted(pair)
    for metric in metrics.METRICS:
        if metric is TRAINING_PEAK:
            yield from _peak(pair, margins)
        elif metric.quantity and (metric.slack_B or metric.kind == "peak"):
            if not (metric.applies(pair.base) and metric.applies(pair.new)):
                continue
            limit, method = margins.growth_limit(metric.slack_B), "counted" if metric.kind == "counted" else "measured"
            yield from _growth(pair, metric.quantity, metric.read(pair.base), metric.read(pair.new), limit, method)
    before, now = _times(pair.base), _times(pair.new)
    for what in dict.fromkeys([*before, *now]):
        if what in now or failed_checks.no_speed(pair.new):  # the row of the failed check explains a hidden time
            yield pair.row(RowKind.TIME, VerdictKind.NOT_RUN, what, TIMES, before.get(what), now.get(what), "s")
        else:
            yield from _one_sided(pair, what, before[what], None, "s")
    yield from _loss(pair)


def counted(pair: RecordPair) -> Iterator[ComparisonRow]:
    """Yield a row for each metric that is counted exactly: numbers of parameters, bytes of tensors, sizes of files.

    Fewer parameters are a regression too, because an unchanged recipe keeps their number.
    """
    for metric in metrics.METRICS:
        if not metric.quantity or metric.kind != "counted" or metric.slack_B:
            continue
        a, b = metric.read(pair.base), metric.read(pair.new)
        if a is None or b is None:
            yield from _one_sided(pair, metric.quantity, a, b, metric.unit)
            continue
        reason = "" if a == b else "grew" if b > a else "shrank"
        word = VerdictKind.FAIL if metric.got_worse(a, b) else VerdictKind.PASS
        yield pair.row(metric.row_kind, word, metric.quantity, reason, a, b, metric.unit)


def _peak(pair: RecordPair, margins: Margins) -> Iterator[ComparisonRow]:
    """Yield a row that compares the peak memory of training.

    The row is inconclusive if the run and the baseline measured their peaks in different ways.
    """
    a, b = training_peak(pair.base), training_peak(pair.new)
    before, now = (r.measurements.memory.source if r.measurements else "" for r in (pair.base, pair.new))
    what, limit = TRAINING_PEAK.quantity, 0
    if before != now:
        if a is not None or b is not None:
            reason = f"measured in two ways: baseline {before}, run {now}"
            yield pair.row(RowKind.MEMORY, VerdictKind.INCONCLUSIVE, what, reason, a, b, "B")
        return
    if now != ALLOCATED:
        a, b = (None if peak is None else above_imports(r, peak) for r, peak in ((pair.base, a), (pair.new, b)))
        what, limit = PEAK, max(PROCESS_PEAK_B, int(PROCESS_SHARE * (a or 0)))
    yield from _growth(pair, what, a, b, margins.growth_limit(limit), now)


def _growth(
    pair: RecordPair, what: str, a: Number | None, b: Number | None, limit: int, method: str
) -> Iterator[ComparisonRow]:
    """Yield a row that compares bytes in the baseline (`a`) and in the run (`b`). It fails if b - a exceeds `limit`.

    If only `a` is known, the row fails too. method: how the bytes were measured.
    """
    if a is None or b is None:
        yield from _one_sided(pair, what, a, b, "B")
        return
    change = "grew" if b - a > limit else "shrank" if a - b > limit else "within the margin" if b != a else ""
    reason = f"{change} (margin {limit:,} B, {method})" if change else ""
    word = VerdictKind.FAIL if b - a > limit else VerdictKind.PASS
    yield pair.row(RowKind.MEMORY, word, what, reason, a, b, "B")


def _one_sided(pair: RecordPair, what: str, a: Number | None, b: Number | None, unit: Unit) -> Iterator[ComparisonRow]:
    """Yield a row if only one value is known: `a` is the value in the baseline, `b` the value in the run."""
    if b is not None:
        yield pair.row(RowKind.NEW, VerdictKind.NOT_RUN, what, "was not measured in the baseline", a, b, unit)
    elif a is not None:
        reason = "was measured in the baseline, and is not now"
        yield pair.row(RowKind.MISSING, VerdictKind.FAIL, what, reason, a, b, unit)


def _times(record: Record) -> dict[str, float]:
    """Return name of a time -> its median in seconds.

    If no time of the Record may be shown (`failed_checks.no_speed`), return an empty dict.
    """
    m = record.measurements
    if m is None or failed_checks.no_speed(record):
        return {}
    timed = (metric for metric in metrics.METRICS if metric.quantity and metric.kind == "timed")
    found = {metric.quantity: value for metric in timed if (value := metric.read(record)) is not None}
    return found | {_latency(record.cell, one): median(one.seconds) for one in m.latency if one.seconds}


def _latency(cell: Cell, latency: Latency) -> str:
    adapters = f" of {latency.adapters}" if latency.variant == "multi-adapter" else ""
    purpose = " for comparison" if is_reference_for_several_adapters(cell, latency) else ""
    return f"{latency.kind} {latency.variant}{adapters}{purpose}, {latency.batch} x {latency.tokens}"


def _loss(pair: RecordPair) -> Iterator[ComparisonRow]:
    """Yield a row that compares the mean training loss over the last quarter of the steps.

    Yield nothing if a Record has no training, or if the two runs trained on different batches.
    """
    a, b = pair.base.training, pair.new.training
    if a is None or b is None or a.data_order_sha256 != b.data_order_sha256:
        return
    before, now = (fmean(t.losses[-math.ceil(len(t.losses) / 4) :]) for t in (a, b))
    rose = now > before + LOSS_SHARE * abs(before) + LOSS
    change = "rose" if rose else "within the margin" if now != before else ""
    reason = f"{change} (margin {100 * LOSS_SHARE:g} % and {LOSS:g})" if change else ""
    word = VerdictKind.FAIL if rose else VerdictKind.PASS
    yield pair.row(RowKind.LOSS, word, "training loss", reason, before, now, "nats")
