"""Measures: scores and losses of training, from the Records (results) of a run with several seeds. Imports no torch.

These runs are small: a difference that they do not show may exist at the paper's scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

from harness.analysis.comparison.baseline_rows import ACCURACY
from harness.analysis.statistics import over_seeds
from harness.analysis.statistics.over_seeds import Spread
from harness.claims import record_sources
from harness.claims.measure import MeasureResult, NotRunError, measure
from harness.claims.measures.records import Entry, SuiteName
from harness.records.record import Accuracy, Record


@measure("property")
def scores_higher(suite: SuiteName, of: Entry, than: Entry) -> MeasureResult:
    """Check whether the mean accuracy of `of` exceeds the mean accuracy of `than`.

    The result is undecided if the interval of the difference contains 0.
    """
    spread, how = _scores(suite, of, than)
    return _above(spread, 0.0, how)


@measure("property")
def scores_no_lower(suite: SuiteName, of: Entry, than: Entry) -> MeasureResult:
    """Check whether the mean accuracy of `of` exceeds the mean accuracy of `than` minus 2 percentage points.

    The 2 points are the margin of the command `gate`. The result is undecided if the interval of the difference
    contains -2 points.
    """
    spread, how = _scores(suite, of, than)
    return _above(spread, -ACCURACY, f"{how}; margin {100 * ACCURACY:g} points")


@measure("property")
def loss_falls_faster(suite: SuiteName, of: Entry, than: Entry) -> MeasureResult:
    """Check whether the mean training loss of `of`, over all steps, is below the mean training loss of `than`.

    Runs with the same seed are compared. They train on the same batches. The result is undecided if the interval of the
    difference contains 0.
    """
    a, b = _seeds(suite, of, than)
    means = [[fmean(_losses(record)) for record in side] for side in (a, b)]
    differences = [right - left for left, right in zip(*means, strict=True)]
    spread = Spread(fmean(differences), math.sqrt(variance(differences) / len(differences)), len(differences) - 1)
    how = f"mean loss over all steps {fmean(means[0]):.4f} and {fmean(means[1]):.4f}, lower by {_difference(spread, 1, 4)}"
    return _above(spread, 0.0, f"{how}, {len(differences)} seeds; {_setup(a, b)}")


def _scores(suite: str, of: str, than: str) -> tuple[Spread, str]:
    a, b = _seeds(suite, of, than)
    left, right = ([_accuracy(record) for record in side] for side in (a, b))
    spread = over_seeds.difference(left, right)
    if spread is None:
        raise NotRunError(f"{of} and {than} were not scored on the same items")
    means = f"{100 * fmean(x.value for x in left):.1f} % and {100 * fmean(x.value for x in right):.1f} %"
    return (
        spread,
        f"accuracy {means}, difference {_difference(spread, 100, 2)} points, {len(left)} seeds; {_setup(a, b)}",
    )


def _above(spread: Spread, least: float, how: str) -> MeasureResult:
    """Return, as the result of a property, whether a difference is above `least`.

    The property is undecided if the interval of the difference has values on both sides of `least`. how: the arithmetic
    as text.
    """
    low, high = spread.interval
    return MeasureResult(low > least, how, None if low > least or high < least else True)


def _difference(spread: Spread, scale: float, digits: int) -> str:
    value, low, high = (f"{scale * one:+z.{digits}f}" for one in (spread.value, *spread.interval))
    return f"{value} [{low}, {high}]"


def _seeds(suite: str, of: str, than: str) -> tuple[list[Record], list[Record]]:
    a, b = (sorted(side, key=lambda r: r.cell.seed) for side in record_sources.records(suite, of, than))
    record_sources.comparable(a, b)
    seeds = [[record.cell.seed for record in side] for side in (a, b)]
    if seeds[0] != seeds[1] or len(a) < 2:
        raise ValueError(f"{of} has the seeds {seeds[0]} and {than} {seeds[1]}; both need the same two seeds or more")
    return a, b


def _accuracy(record: Record) -> Accuracy:
    found = record.measurements.accuracy if record.measurements else None
    if found is None:
        raise NotRunError(f"{record.cell.label} was not scored")
    return found


def _losses(record: Record) -> list[float]:
    training = record.measurements.training if record.measurements else None
    if training is None or not training.losses:
        raise NotRunError(f"{record.cell.label} trained nothing")
    return training.losses


def _setup(a: Sequence[Record], b: Sequence[Record]) -> str:
    cell = a[0].cell
    names = f"{cell.label} and {b[0].cell.label}"
    return f"{names}, {cell.training.steps} steps on {cell.task}; {record_sources.place(a[0])}"
