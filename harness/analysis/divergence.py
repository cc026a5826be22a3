"""Detection of trainings that ended with a far higher loss than they began with, though every loss is finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from harness.records.record import Record

FEW = 5
"""Number of steps at either end of the training. Medians over them are compared, since a single batch may be hard."""
TIMES = 2.0
NATS = math.log(2)
"""Training diverged if the loss rose by more than the factor TIMES and by more than NATS. Chance may double a loss near
0, and may change a loss of 5 by log(2)."""


def rose(losses: Sequence[float]) -> str:
    """Return evidence that the loss ended far above its beginning; an empty string otherwise or for fewer than two steps."""
    few = min(FEW, len(losses) // 2)
    if not few:
        return ""
    first, last = median(losses[:few]), median(losses[-few:])
    if last <= TIMES * first or last <= first + NATS:
        return ""
    medians = f"the medians of the first and the last {few} " if few > 1 else ""
    return f"the loss rose from {first:.3g} to {last:.3g} ({medians}of {len(losses)} steps): training diverged"


def diverging(record: Record) -> str:
    """Return the evidence of `rose` for the losses of a Record; an empty string without training."""
    return rose(record.training.losses) if record.training else ""
