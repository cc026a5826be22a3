"""Detect training runs whose loss is far higher at the end than at the start, although every loss is finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from harness.records.record import Record

FEW = 5
"""Number of first steps, and number of last steps, whose median losses are compared. A median is used because a single
batch may be hard."""
LEAST_FACTOR = 2.0
LEAST_RISE_NATS = math.log(2)
"""Smallest rise of the loss, in nats, that counts as divergence. The last loss must also exceed LEAST_FACTOR times the
first. Either rise alone may be chance: a loss near 0 may double, and a loss of 5 may rise by log(2)."""


def rose(losses: Sequence[float]) -> str:
    """Return evidence, as text, that the last losses are far above the first losses.

    Without evidence, and for fewer than two steps, return an empty string.
    """
    few = min(FEW, len(losses) // 2)
    if not few:
        return ""
    first, last = median(losses[:few]), median(losses[-few:])
    if last <= LEAST_FACTOR * first or last <= first + LEAST_RISE_NATS:
        return ""
    medians = f"the medians of the first and the last {few} " if few > 1 else ""
    return f"the loss rose from {first:.3g} to {last:.3g} ({medians}of {len(losses)} steps): training diverged"


def diverging(record: Record) -> str:
    """Return evidence, as text, that the training of a Record diverged although every loss is finite.

    Without evidence, and without training, return an empty string.
    """
    return rose(record.training.losses) if record.training else ""
