"""Measures: times of Cells, from the Records of a run. Imports no torch.

An entry of a suite is a training setup. Its Cells differ only in the seed; each runs in a process of its own, and has a
Record with its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Literal

from harness.analysis import failed_checks, measurements
from harness.analysis.statistics.intervals import LEVEL, Median, median_interval
from harness.analysis.statistics.process_runs import ASSUMED, FEWEST
from harness.claims import record_sources
from harness.claims.interval import ONE, Interval
from harness.claims.measure import MeasureResult, NotRunError, measure
from harness.claims.measures.records import Entry, SuiteName, over, pair
from harness.records.record import Latency, Record, TrainingMeasured

Variant = Literal["base", "unmerged", "merged"]
Kind = Literal["forward", "prefill", "decode"]


@measure("seconds")
def step_time(suite: SuiteName, cell: Entry) -> MeasureResult:
    """Median time of a training step of a Cell, with an interval.

    The interval covers the variation between processes. The times hold only for the machine of the Records.
    """
    (own,) = record_sources.records(suite, cell)
    seconds, processes = _between_processes(_steps(own), own)
    return seconds.measured(f"a step of {own[0].cell.label}, {processes}; {record_sources.place(own[0])}")


@measure("rate")
def throughput(suite: SuiteName, cell: Entry) -> MeasureResult:
    """Tokens per second in training, without padding: the median over the steps, with an interval as for `step_time`.

    Reports show another number, which is all tokens divided by all seconds, and which has no interval. The two numbers
    differ if the texts differ in length.
    """
    (own,) = record_sources.records(suite, cell)
    rate, processes = _between_processes(_merge([_rate(record) for record in own]), own)
    return rate.measured(f"steps of {own[0].cell.label}, {processes}; {record_sources.place(own[0])}")


@measure("ratio")
def step_time_ratio(suite: SuiteName, of: Entry, to: Entry) -> MeasureResult:
    """Ratio `of` / `to` of the median times of a training step, with an interval.

    The interval comes from order statistics. With few processes, it is widened by an assumed deviation between
    processes.
    """
    ratio, times, how = _compared(suite, of, to, _steps)
    return ratio.measured(f"{times} per step; {how}")


@measure("share")
def step_time_more(suite: SuiteName, of: Entry, than: Entry) -> MeasureResult:
    """Relative increase of the time of a training step, `of` / `than` - 1; negative if `of` is faster."""
    ratio, times, how = _compared(suite, of, than, _steps)
    return (ratio - ONE).measured(f"{times} per step, minus 1; {how}")


@measure("ratio")
def latency_ratio(suite: SuiteName, cell: Entry, of: Variant, to: Variant, at: Kind) -> MeasureResult:
    """Ratio `of` / `to` of the times that two variants of a Cell's model (e.g. base and merged) take for one pass.

    Both are timed in the same process. at: kind of pass: a forward pass, a prefill, or the decoding of one token.
    """
    (own,) = record_sources.records(suite, cell)
    x, y = (_merge([_latency(record, variant, at) for record in own]) for variant in (of, to))
    shape = next(one for one in _latencies(own[0]) if one.kind == at)
    how = f"{at} of {shape.batch} x {shape.tokens} tokens, {of} {_seconds(x)} / {to} {_seconds(y)}"
    return over(x, y).measured(f"{how}; {record_sources.place(own[0])}")


@measure("ratio")
def phase_ratio(suite: SuiteName, phase: str, of: Entry, to: Entry) -> MeasureResult:
    """Ratio `of` / `to` of the times that two Cells take for a phase, e.g. `attach`.

    The interval covers the variation between processes.
    """
    ratio, times, how = _compared(suite, of, to, lambda own: _merge([_phase(record, phase) for record in own]))
    return ratio.measured(f"{times} for {phase}; {how}")


@measure("share")
def refresh_share(suite: SuiteName, cell: Entry) -> MeasureResult:
    """Share of the training time that GaLore's projector refreshes take.

    The first step has a refresh, and takes longer than a median step. The result is a range from 0 to this extra time,
    as a share of the time of all steps until the next refresh. It begins at 0 because the first step also warms up.
    """
    (own,) = record_sources.records(suite, cell)
    training, gap = own[0].measurements and own[0].measurements.training, own[0].cell.config.get("update_gap")
    if not training or not isinstance(gap, int):
        raise ValueError(f"{own[0].cell.label} has no projectors to refresh")
    first, usual = Fraction(training.step_seconds[0]), Fraction(_step_time(own[0]).value)
    how = f"at most ({float(first):.4g} s - {float(usual):.4g} s) / {gap} / {float(usual):.4g} s"
    how += ", as a first step also warms up"
    return MeasureResult(0, f"{how}; {record_sources.place(own[0])}", max(Fraction(0), first - usual) / gap / usual)


def _compared(suite: str, of: str, to: str, time: Callable[[Sequence[Record]], Interval]) -> tuple[Interval, str, str]:
    """Return the ratio of two times, a text with both times, and a text with the number of processes and the machine.

    time: function that returns the time of a Cell from its Records.
    """
    a, b = pair(suite, of, to)
    x, y = time(a), time(b)
    ratio, processes = _between_processes(over(x, y), a, b)
    return ratio, f"{_seconds(x)} / {_seconds(y)}", f"{processes}; {record_sources.place(a[0])}"


def _merge(intervals: Sequence[Interval]) -> Interval:
    """Return the smallest interval that covers all of `intervals`, one per process.

    The value of the result is the median of the values of `intervals`.
    """
    values = sorted(x.value for x in intervals)
    return Interval(values[len(values) // 2], min(x.least for x in intervals), max(x.most for x in intervals))


def _steps(own: Sequence[Record]) -> Interval:
    return _merge([_step(record) for record in own])


def _step(record: Record) -> Interval:
    return _certain(_step_time(record), f"steps of {record.cell.label}")


def _rate(record: Record) -> Interval:
    if (rate := measurements.step_rate(_trained(record))) is None:
        raise NotRunError(f"every step of {record.cell.label} took 0 s by the clock")
    return _certain(rate, f"steps of {record.cell.label}")


def _step_time(record: Record) -> Median:
    return measurements.step_time(_trained(record))


def _trained(record: Record) -> TrainingMeasured:
    """Return the training measurements of a Record. Raises NotRunError if its times are unusable."""
    training = record.measurements.training if record.measurements else None
    if why := failed_checks.no_speed(record) or record_sources.shared(record):
        raise NotRunError(f"{record.cell.label}: {why}")
    if training is None or not training.step_seconds:
        raise NotRunError(f"{record.cell.label} trained nothing")
    return training


def _certain(m: Median, of: str) -> Interval:
    if m.low is None or m.high is None:
        raise NotRunError(f"{m.count} timed {of} are too few for an interval at {100 * LEVEL:g} %")
    return Interval.around(m.value, m.low, m.high)


def _latencies(record: Record) -> list[Latency]:
    return record.measurements.latency if record.measurements else []


def _latency(record: Record, variant: Variant, kind: Kind) -> Interval:
    refused: Callable[[Record], str] = failed_checks.no_merged_speed if variant == "merged" else failed_checks.no_speed
    if why := refused(record) or record_sources.shared(record):
        raise NotRunError(f"{record.cell.label}: {why}")
    one = next((x for x in _latencies(record) if (x.variant, x.kind) == (variant, kind)), None)
    if one is None or not one.seconds:
        why = one.because if one else "its Record has no such time"
        raise NotRunError(f"{kind} of {record.cell.label} was not timed {variant}: {why}")
    return _certain(median_interval(one.seconds), f"passes of {record.cell.label}")


def _phase(record: Record, name: str) -> Interval:
    if why := record_sources.shared(record):
        raise NotRunError(f"{record.cell.label}: {why}")
    seconds = [phase.seconds for phase in record.phases if phase.name == name]
    if not seconds:
        known = ", ".join(phase.name for phase in record.phases)
        raise ValueError(f"{record.cell.label} has no phase `{name}`; it has {known}")
    whole = sum(seconds)
    return Interval.around(whole, whole, whole)


def _seconds(x: Interval) -> str:
    return f"{float(x.value):.4g} s ({float(x.least):.4g} to {float(x.most):.4g})"


def _between_processes(found: Interval, *sides: Sequence[Record]) -> tuple[Interval, str]:
    """Return an interval that covers the variation between processes, and a text with the number of processes.

    found: a time or a ratio, with the interval that the processes give. If there are too few processes to show this
    variation, the returned interval is wider than the interval of `found`, and the text says so.
    """
    counts = [len(side) for side in sides]
    count = "one process" if max(counts) == 1 else f"{min(counts)} processes"
    each = count + " each" * (len(counts) > 1)
    if min(counts) >= FEWEST:
        return found, each
    error = ASSUMED * math.sqrt(sum(1 / n for n in counts))
    factor = Fraction(math.exp(NormalDist().inv_cdf(0.5 + LEVEL / 2) * error))
    wider = Interval(found.value, found.least / factor, found.most * factor)
    seen = f"{float(found.least):.4g} to {float(found.most):.4g}"
    return wider, f"{each}, so {seen} is widened by an assumed deviation of {100 * ASSUMED:g} % between processes"
