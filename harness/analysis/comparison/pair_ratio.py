"""Log ratios of the times of one pair of process runs, new side over old."""

from __future__ import annotations

import math
from statistics import median

from harness.analysis import tracked_metrics
from harness.analysis.measurements import steady
from harness.analysis.tracked_metrics import LATENCY, SENTINEL, STEP
from harness.errors import HarnessError
from harness.records.record import Record, TrainingMeasured


def times(record: Record) -> dict[str, float]:
    """Return the times, in seconds, that code can change: the step, and latencies except those of the bare base."""
    return {metric: s for metric, s in tracked_metrics.times(record).items() if not metric.startswith(SENTINEL)}


def named(metric: str) -> str:
    """Return a metric in words, as in `step` and `merged decode 1x8`."""
    return "step" if metric == STEP else metric.removeprefix(f"{LATENCY}/").replace("/", " ")


def log_ratio(old: Record, new: Record, metric: str = STEP) -> float:
    """Return log(new / old) of a time of `times`, by default that of a steady step.

    Two sides that train on the same batches are compared step by step, and the pair gets the median of these log ratios:
    twice the tokens take twice the time, and the two sides may have different median steps. Otherwise the pair gets the
    ratio of the two medians. Steps are no statistical units: steps of one process are not independent. Raises HarnessError
    if a side lacks that time.
    """
    sides = [record.measurements.training if record.measurements else None for record in (old, new)]
    if metric == STEP and (matched := _matched(*sides)):
        return median(math.log(after) - math.log(before) for before, after in matched)
    taken = [times(record).get(metric) for record in (old, new)]
    for which, seconds in zip(("old", "new"), taken, strict=True):
        if not seconds:
            what = "has no steps that took any time" if metric == STEP else f"has no times of {named(metric)}"
            raise HarnessError(what, where=f"the {which} side", hint="time more of them per process")
    return math.log(taken[1] or 0.0) - math.log(taken[0] or 0.0)


def _matched(old: TrainingMeasured | None, new: TrainingMeasured | None) -> list[tuple[float, float]]:
    """Return the seconds of each steady step by both sides; none if their batches differ or a step took no time."""
    if old is None or new is None:
        return []
    batches = [(side.data_order_sha256, side.padded_tokens, side.timing_warmup) for side in (old, new)]
    seconds = list(zip(old.step_seconds[steady(old)], new.step_seconds[steady(new)], strict=False))
    return seconds if batches[0] == batches[1] and all(min(pair) > 0 for pair in seconds) else []
