"""Measure: the ratio of two best learning rates, from Records (results) of several rates and seeds. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, variance
from typing import Annotated

from pydantic import Field

from harness.analysis.statistics.over_seeds import Spread
from harness.claims import record_sources
from harness.claims.measure import MeasureResult, NotRunError, measure
from harness.claims.measures.records import Entry, SuiteName
from harness.records.record import Record

Rates = Annotated[list[Entry], Field(min_length=3)]
"""A parameter that lists the ids of entries of a suite. They differ only in the learning rate; the lowest rate comes
first."""


@measure("ratio")
def best_rate_ratio(suite: SuiteName, of: Rates, to: Rates) -> MeasureResult:
    """Ratio of two best learning rates, `of` / `to`, with a confidence interval over seeds.

    `of` and `to` are lists of suite entries that differ only in their learning rates. For each seed, the loss of an
    entry is its mean training loss over the last third of the steps; all entries train on the same batches. A parabola
    in the logarithm of the rate is drawn through the lowest loss and its two neighbours. The best rate is the vertex of
    this parabola. If the lowest loss is at an end of a list, the best rate may be outside of the list, and the measure
    gives no result.
    """
    above, below = _sides(suite, of, to)
    if list(above) != list(below) or len(above) < 2:
        what = f"{of[0]} has the seeds {list(above)} and {to[0]} {list(below)}"
        raise ValueError(f"{what}; both sides need the same two seeds or more")
    best = [[_best(side[seed]) for seed in side] for side in (above, below)]
    logs = [math.log(x / y) for x, y in zip(*best, strict=True)]
    spread = Spread(fmean(logs), math.sqrt(variance(logs) / len(logs)), len(logs) - 1)
    least, most = map(math.exp, spread.interval)
    rates = " and ".join(f"{math.exp(fmean(map(math.log, side))):.2g}" for side in best)
    first = next(iter(above.values()))[0]
    how = (
        f"best rates {rates}, geometric means over {len(logs)} seeds; ratio {math.exp(spread.value):.3g} "
        f"[{least:.3g}, {most:.3g}]; {first.cell.training.steps} steps on {first.cell.task}; {record_sources.place(first)}"
    )
    return MeasureResult(least, how, most=most)


def _sides(suite: str, of: Sequence[str], to: Sequence[str]) -> list[dict[int, list[Record]]]:
    """Return, for `of` and for `to`, seed -> Records with this seed, in the order of the entries."""
    found = record_sources.records(suite, *of, *to)
    record_sources.comparable(*found)
    sides = []
    for names, entries in ((of, found[: len(of)]), (to, found[len(of) :])):
        rates = [entry[0].cell.training.lr for entry in entries]
        if any(lower >= higher for lower, higher in pairwise(rates)):
            raise ValueError(
                f"the learning rates of {', '.join(names)} are {rates}; list them from the lowest to the highest"
            )
        if len({_without_rate(entry[0]) for entry in entries}) > 1:
            raise ValueError(f"{', '.join(names)} differ in more than the learning rate")
        by_seed = [{record.cell.seed: record for record in entry} for entry in entries]
        if any(one.keys() != by_seed[0].keys() for one in by_seed):
            raise ValueError(f"{', '.join(names)} have different seeds")
        sides.append({seed: [one[seed] for one in by_seed] for seed in sorted(by_seed[0])})
    return sides


def _without_rate(record: Record) -> str:
    recipe = record.cell.recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"lr": 0.0})}).cell_id


def _best(records: Sequence[Record]) -> float:
    """Return the best learning rate: the vertex of the parabola through the lowest loss and its two neighbours.

    records: one Record per learning rate, the lowest rate first.
    """
    x = [math.log(record.cell.training.lr) for record in records]
    y = [_loss(record) for record in records]
    at = min(range(len(y)), key=y.__getitem__)
    if at in (0, len(y) - 1):
        end, more = ("lowest", "lower") if at == 0 else ("highest", "higher")
        label = records[at].cell.label
        raise NotRunError(
            f"{label} has its lowest loss at the {end} learning rate, {records[at].cell.training.lr:g}, "
            f"with seed {records[at].cell.seed}; add a {more} one to the suite, and run it again"
        )
    left, right = x[at] - x[at - 1], x[at + 1] - x[at]
    rises, falls = (y[at - 1] - y[at]) / left, (y[at + 1] - y[at]) / right
    if rises + falls == 0:  # three equal losses: the parabola is a line
        return math.exp(x[at])
    return math.exp(x[at] + (rises * right - falls * left) / (2 * (rises + falls)))


def _loss(record: Record) -> float:
    training = record.measurements.training if record.measurements else None
    if training is None or not training.losses:
        raise NotRunError(f"{record.cell.label} trained nothing")
    return fmean(training.losses[2 * len(training.losses) // 3 :])
