"""Time to a target loss: seconds of training until the smoothed training loss of a recipe first reaches a target.

A recipe is a set of Cells that differ only in the seed. A group of recipes with one budget has one target: the highest
final loss among the recipes near the highest accuracy (`choice.MARGIN`). So each of these recipes reaches the target.
The time says how fast a recipe reaches the loss of a recipe that a reader might choose. A smoothed loss is the mean
over the last steps. The time is the sum over all steps, including warm-up, without start-up and evaluation. A low
training loss does not prove a high accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from statistics import median_high

from harness.analysis import failed_checks
from harness.analysis.choice import Choice
from harness.analysis.ranking import RankingEntry
from harness.records.record import Record


@dataclass(frozen=True)
class TargetLoss:
    """Target loss of a group. Each recipe is timed until its smoothed training loss first reaches `loss`."""

    loss: float
    """Smoothed training loss to reach, in nats."""
    window: int
    """Number of consecutive steps over which a loss is averaged to smooth it."""


@dataclass(frozen=True)
class TimeToTarget:
    """Training time until the smoothed loss of a recipe first reached the target: the median over its seeds.

    If the number of seeds is even, the median is the higher of the two middle values.
    """

    seconds: float
    """Training time until the target, in seconds; infinite if at most half of the seeds reached the target."""
    steps: float
    """Number of steps until the target; infinite if at most half of the seeds reached the target."""
    reached: int
    """Number of seeds that reached the target."""
    seeds: int
    """Number of seeds whose losses and step times are known."""


def target(chosen: Choice) -> TargetLoss | None:
    """Return the target loss of a group of recipes. Return None if no recipe near the highest accuracy has losses."""
    window = _window(max((len(losses) for e in chosen.near for r in e.records if (losses := _losses(r))), default=0))
    final = [loss for e in chosen.near if (loss := _typical(e, lambda r: _final(r, window))) is not None]
    return TargetLoss(max(final), window) if final else None


def time_to(entry: RankingEntry, to: TargetLoss) -> TimeToTarget | None:
    """Return how long a recipe trained until it reached the target.

    Return None if the recipe has no losses or no times of steps, or if a failed check hides the times of one of its
    Cells.
    """
    timed = [r for r in entry.records if r.training and len(r.training.step_seconds) == len(_losses(r)) > 0]
    if not timed or any(map(failed_checks.no_speed, entry.records)):
        return None
    steps = [_first(r, to) for r in timed]
    seconds = [math.inf if n is None else math.fsum(_seconds(r)[:n]) for r, n in zip(timed, steps, strict=True)]
    reached = [math.inf if n is None else n for n in steps]
    return TimeToTarget(median_high(seconds), median_high(reached), sum(n is not None for n in steps), len(timed))


def smoothed(losses: list[float], window: int) -> list[float]:
    """Return the mean of each `window` consecutive losses, e.g. for a window of 2: [3, 1, 2] -> [2, 1.5]."""
    sums = [0.0, *accumulate(losses)]
    return [(sums[end] - sums[end - window]) / window for end in range(window, len(sums))]


def _window(steps: int) -> int:
    """Return the number of steps that one smoothed loss averages: a tenth of the training, but at least five steps."""
    return min(max(5, steps // 10), steps)


def _first(record: Record, to: TargetLoss) -> int | None:
    """Return the number of steps until a Record's smoothed loss first reached the target; None if it never did."""
    found = (n for n, loss in enumerate(smoothed(_losses(record), to.window), to.window) if loss <= to.loss)
    return next(found, None)


def _final(record: Record, window: int) -> float | None:
    means = smoothed(_losses(record), window) if window else []
    return means[-1] if means else None


def _typical(entry: RankingEntry, read: Callable[[Record], float | None]) -> float | None:
    values = [value for record in entry.records if (value := read(record)) is not None and math.isfinite(value)]
    return median_high(values) if values else None


def _losses(record: Record) -> list[float]:
    return record.training.losses if record.training else []


def _seconds(record: Record) -> list[float]:
    return record.training.step_seconds if record.training else []
