"""Log ratios (new / old) of the times of one Cell, from a process with the old code and a process with the new code."""

from __future__ import annotations

import math
from statistics import median

from harness.analysis import tracked_metrics
from harness.analysis.measurements import steady
from harness.analysis.tracked_metrics import LATENCY, SENTINEL, STEP
from harness.errors import HarnessError
from harness.records.record import Record, TrainingMeasured


def times(record: Record) -> dict[str, float]:
    """Return name of a metric -> seconds, for the times that the code under test can change.

    These are the time of a training step and all latencies, except the latencies of the bare base model.
    """
    return {metric: s for metric, s in tracked_metrics.times(record).items() if not metric.startswith(SENTINEL)}


def metric_text(metric: str) -> str:
    """Return the name of a metric in words, e.g. `step` or `merged decode 1x8`."""
    return "step" if metric == STEP else metric.removeprefix(f"{LATENCY}/").replace("/", " ")


def log_ratio(old: Record, new: Record, metric: str = STEP) -> float:
    """Return log(new / old) of the time that `metric` names. The default metric is the time of a steady step.

    If both sides trained on the same batches, the result is the median of the log ratios of the single steps. The ratio
    of two medians would be worse: the medians may belong to different batches, and a batch with twice the tokens takes
    twice the time. For other metrics, and for different batches, the result is the log ratio of the two medians.

    The steps of one process are not independent of each other, so they give only this single number. Raises
    HarnessError if `old` or `new` has no such time above 0.
    """
    if metric == STEP and (matched := _matched(old.training, new.training)):
        return median(math.log(after) - math.log(before) for before, after in matched)
    before, after = (times(record).get(metric) for record in (old, new))
    for which, seconds in (("old", before), ("new", after)):
        if not seconds:
            what = (
                "has no step time above 0 s" if metric == STEP else f"has no time above 0 s for {metric_text(metric)}"
            )
            raise HarnessError(what, where=f"the {which} side", hint="time more steps or requests per process")
    return math.log(after or 0.0) - math.log(before or 0.0)


def _matched(old: TrainingMeasured | None, new: TrainingMeasured | None) -> list[tuple[float, float]]:
    """Return the seconds of each steady step as pairs (old, new).

    The list is empty if a side did not train, if the batches differ, or if a step took no time.
    """
    if old is None or new is None:
        return []
    batches = [(side.data_order_sha256, side.padded_tokens, side.timing_warmup) for side in (old, new)]
    seconds = list(zip(old.step_seconds[steady(old)], new.step_seconds[steady(new)], strict=False))
    return seconds if batches[0] == batches[1] and all(min(pair) > 0 for pair in seconds) else []
