"""How much slower the new side of one pair of process runs is than the old."""

from __future__ import annotations

import math
from statistics import median

from harness.analysis.measured import steady, step_seconds
from harness.errors import HarnessError
from harness.records import Record, TrainingMeasured


def log_ratio(old: Record, new: Record) -> float:
    """Return log(new / old) of the time of a steady step.

    Two sides that train on the same batches are compared step by step, and the median of these log ratios is the pair's: a
    text of twice the tokens takes twice the time, and the median step of one side need not be that of the other. Else it is
    the ratio of the two medians. Steps are no units: those of one process share its luck. Raises HarnessError where a side
    has no step that took any time.
    """
    sides = [record.measurements.training if record.measurements else None for record in (old, new)]
    if matched := _matched(*sides):
        return median(math.log(after) - math.log(before) for before, after in matched)
    medians = [step_seconds(record) for record in (old, new)]
    for which, taken in zip(("old", "new"), medians, strict=True):
        if not taken:
            raise HarnessError(
                "has no steps that took any time", where=f"the {which} side", mend="time more steps per process"
            )
    return math.log(medians[1] or 0.0) - math.log(medians[0] or 0.0)


def _matched(old: TrainingMeasured | None, new: TrainingMeasured | None) -> list[tuple[float, float]]:
    """Return the seconds of each steady step by both sides; none where they are not of the same batches, or took no time."""
    if old is None or new is None:
        return []
    batches = [(side.data_order_sha256, side.padded_tokens, side.timing_warmup) for side in (old, new)]
    seconds = list(zip(old.step_seconds[steady(old)], new.step_seconds[steady(new)], strict=False))
    return seconds if batches[0] == batches[1] and all(min(pair) > 0 for pair in seconds) else []
