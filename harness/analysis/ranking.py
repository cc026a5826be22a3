"""Rankings of recipes by accuracy, within equal budgets, with ties as ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from harness.analysis.statistics import over_seeds, seed_spread
from harness.analysis.statistics.intervals import LEVEL, detectable, holm, mcnemar, wilson
from harness.analysis.statistics.seed_spread import Prior
from harness.records.record import Accuracy, Cell, Record
from harness.records.store import Run

Standing = Literal["best", "tied", "below", "untrained"]
Basis = Literal["tied", "all", "independent", "seeds"]
Priors = tuple[Prior | None, Prior | None]


@dataclass(frozen=True)
class Budget:
    """Settings that must be equal before two accuracies may be ranked.

    Learning rates may differ: each method chooses its own. `accumulate`, `checkpointing`, `compile` and `layerwise` change
    the cost of a step, not its result. The optimizer may differ; names and report show it, see `Group.optimizers`.
    """

    model: str
    task: str
    dtype: str
    steps: int
    batch: int
    max_tokens: int
    items: int
    skip: int

    @classmethod
    def of(cls, cell: Cell) -> Budget:
        """Return the budget of a Cell."""
        t = cell.training
        e = cell.evaluation
        return cls(cell.model, cell.task, cell.dtype, t.steps, t.batch, t.max_tokens, e.items, e.skip)

    def same_test(self, other: Budget) -> bool:
        """Return whether both score the same items in the same way; the training may differ."""
        mine, its = ((b.model, b.task, b.dtype, b.max_tokens, b.items, b.skip) for b in (self, other))
        return mine == its


def why_not_comparable(left: Cell, right: Cell) -> str:
    """Return the reason why two accuracies may not be compared, or an empty string. An untrained Cell spends no budget."""
    a, b = Budget.of(left), Budget.of(right)
    untrained = 0 in (a.steps, b.steps)
    if a == b or (untrained and a.same_test(b)):
        return ""
    skip = ("steps", "batch") if untrained else ()
    unequal = [name for name in Budget.__annotations__ if name not in skip and getattr(a, name) != getattr(b, name)]
    return ", ".join(f"{name} {getattr(a, name)} against {getattr(b, name)}" for name in unequal)


@dataclass(frozen=True)
class Score:
    """An accuracy, or the mean over seeds, with its interval."""

    value: float
    low: float
    high: float
    means: str
    """Kind of interval."""


@dataclass(frozen=True)
class RankingEntry:
    """Place of one recipe in its group: one or more Cells that differ only in the seed."""

    records: tuple[Record, ...]
    """Records, by seed."""
    score: Score
    """Accuracy."""
    standing: Standing
    """Place relative to the best."""
    difference: float = 0.0
    """Accuracy minus that of the best."""
    p: float | None = None
    """p value of the paired test against the best, adjusted for the number of tests in the group; None where the
    items differ, so that only the intervals are compared."""

    @property
    def record(self) -> Record:
        """The Record of the first seed; it represents all seeds in facts that do not depend on chance."""
        return self.records[0]


@dataclass(frozen=True)
class Group:
    """Recipes with one budget, best first, then untrained ones."""

    budget: Budget
    """Shared budget."""
    ranked: tuple[RankingEntry, ...]
    """Trained recipes, best first."""
    untrained: tuple[RankingEntry, ...]
    """Untrained recipes."""
    seeds: tuple[int, ...]
    """Seeds of each trained recipe."""
    tries: int
    """Number of learning rates tried and scored for each recipe."""
    detectable: float | None
    """Smallest difference that one comparison in this group can detect; None with nothing to compare."""
    disagreement: float
    """Share of items that `detectable` is computed from."""
    basis: Basis
    """Source of `disagreement`: observed between the best and the recipe that differs most from it, among those
    `tied` with it or among `all`, or assumed for `independent` answers. With several seeds it is `seeds`: the
    largest standard error of a difference from the best."""

    @property
    def entries(self) -> tuple[RankingEntry, ...]:
        """All entries, ranked ones first."""
        return self.ranked + self.untrained

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers of its trained Cells, by their names in suites."""
        return tuple(dict.fromkeys(e.record.cell.optimizer for e in self.ranked))

    @property
    def is_ranking(self) -> bool:
        """True if there is more than one trained recipe to rank."""
        return len(self.ranked) > 1

    @property
    def data_differ(self) -> bool:
        """True if two runs with the same seed trained on different examples, or in a different order."""
        orders: dict[int, set[str]] = {}
        for record in (r for e in self.ranked for r in e.records):
            training = record.measurements.training if record.measurements else None
            if training and training.data_order_sha256:
                orders.setdefault(record.cell.seed, set()).add(training.data_order_sha256)
        return any(len(found) > 1 for found in orders.values())


_Scored = tuple[Record, ...]
_Place = tuple[Budget, tuple[int, ...], int]


def groups(run: Run) -> tuple[Group, ...]:
    """Sort a run's accuracies into groups of equal budget, in the order of the manifest.

    A recipe that lacks a seed is in a separate group: otherwise the seeds that worked would stand for those that failed.
    The tries of a search for a learning rate are not ranked.
    """
    latest = run.latest()
    swept = {cell_id for tuning in run.manifest.tuning for cell_id in tuning.sweep}
    tries = {
        cell_id: sum(i in latest and _scored(latest[i]) is not None for i in tuning.sweep)
        for tuning in run.manifest.tuning
        for cell_id in tuning.cells
    }
    recipes: dict[str, list[Record]] = {}
    for record in latest.values():
        if record.cell_id not in swept and _scored(record) is not None:
            recipes.setdefault(record.cell.recipe_id, []).append(record)
    trained: dict[_Place, list[_Scored]] = {}
    untrained: list[_Scored] = []
    for found in recipes.values():
        records = tuple(sorted(found, key=lambda record: record.cell.seed))
        cell = records[0].cell
        if cell.training.steps:
            seeds = tuple(record.cell.seed for record in records)
            place = (Budget.of(cell), seeds if len(seeds) > 1 else (), tries.get(cell.cell_id, 0))
            trained.setdefault(place, []).append(records)
        else:
            untrained.append(records)

    def beside(budget: Budget) -> list[_Scored]:
        return [u for u in untrained if Budget.of(u[0].cell).same_test(budget)]

    of_trained = [_group(budget, tried, scored, beside(budget)) for (budget, _, tried), scored in trained.items()]
    alone: dict[Budget, list[_Scored]] = {}
    for records in untrained:
        budget = Budget.of(records[0].cell)
        if not any(budget.same_test(other) for other, _, _ in trained):
            alone.setdefault(budget, []).append(records)
    return tuple(of_trained + [_group(budget, 0, [], scored) for budget, scored in alone.items()])


def score(records: Sequence[Record], prior: Prior | None = None) -> Score:
    """Return the accuracy of one Record with its own interval, or the mean of several with one over seeds and items.

    prior: the spread over seeds of other recipes.
    """
    scored = accuracies(records)
    if len(scored) == 1:
        (only,) = scored
        return Score(only.value, only.low, only.high, only.interval)
    found = over_seeds.mean(scored, prior)
    if found is None:
        return Score(fmean(a.value for a in scored), 0.0, 1.0, "none: the runs did not score the same items")
    low, high = found.interval
    if not found.error:  # every run right on every item, or wrong on every item: the next item is still uncertain
        low, high = wilson(round(found.value * (n := len(scored[0].items))), n)
    how = over_seeds.MODERATED if prior else over_seeds.INTERVAL
    return Score(found.value, max(0.0, low), min(1.0, high), how)


def accuracies(records: Sequence[Record]) -> list[Accuracy]:
    """Return the accuracy of each Record that has one."""
    return [a for r in records if (a := _scored(r)) is not None]


def _scored(record: Record) -> Accuracy | None:
    return record.measurements.accuracy if record.measurements else None


def _group(budget: Budget, tries: int, scored: Sequence[_Scored], untrained: Sequence[_Scored]) -> Group:
    # Untrained Cells do not depend on the seed, so they carry no information about the spread of others.
    spread = seed_spread.prior([accuracies(records) for records in scored])
    priors = {records[0].id: spread for records in scored}
    scores = {r[0].id: score(r, priors.get(r[0].id)) for r in (*scored, *untrained)}

    def highest_first(some: Sequence[_Scored]) -> list[_Scored]:
        return sorted(some, key=lambda records: -scores[records[0].id].value)

    everyone = [*highest_first(scored), *highest_first(untrained)]
    best = everyone[0]
    found = {
        r[0].id: RecipePair.of(best, r, (priors.get(best[0].id), priors.get(r[0].id)))
        for r in everyone
        if r is not best
    }
    # The same items chose the best recipe, so all pairs count as tests, not only those with the best.
    pairs = len(everyone) * (len(everyone) - 1) // 2
    p = holm({i: pair.p for i, pair in found.items() if pair is not None}, pairs)
    top = scores[best[0].id]

    def entry(records: _Scored, *, trained: bool) -> RankingEntry:
        own, mine = p.get(records[0].id), scores[records[0].id]
        separate = own <= 1 - LEVEL if own is not None else mine.high < top.low
        ranked: Standing = "best" if records is best else "below" if separate else "tied"
        return RankingEntry(records, mine, ranked if trained else "untrained", mine.value - top.value, own)

    ranked = tuple(entry(records, trained=True) for records in everyone[: len(scored)])
    rivals = everyone[1 : len(scored)] or everyone[1:]
    tied = [found[e.record.id] for e in ranked if e.standing == "tied"]
    detects, basis, disagreement = _resolution(tied, [found[r[0].id] for r in rivals], best, top)
    return Group(
        budget=budget,
        ranked=ranked,
        untrained=tuple(entry(records, trained=False) for records in everyone[len(scored) :]),
        seeds=tuple(sorted({r.cell.seed for records in (scored or untrained) for r in records})),
        tries=tries,
        detectable=detects if rivals else None,
        disagreement=disagreement,
        basis=basis,
    )


@dataclass(frozen=True)
class RecipePair:
    """Comparison of two recipes on the same items."""

    difference: float
    """Difference of the accuracies."""
    p: float
    """p value of no difference."""
    detectable: float
    """Smallest difference that this pair can show."""
    disagreement: float | None
    """Share of items that exactly one of two runs got right; None over several seeds."""

    @classmethod
    def of(cls, left: Sequence[Record], right: Sequence[Record], priors: Priors = (None, None)) -> RecipePair | None:
        """Compare; None where the items are not the same, or one side has one run and the other several.

        priors: for each side the spread over seeds of other recipes.
        """
        a, b = accuracies(left), accuracies(right)
        if (len(a) > 1) != (len(b) > 1):
            return None
        if len(a) > 1:
            spread = over_seeds.difference(a, b, priors)
            return RecipePair(spread.value, spread.p, spread.detectable, None) if spread else None
        table = _discordant(a[0], b[0])
        if table is None:
            return None
        n, differ = len(a[0].items), sum(table)
        return RecipePair((table[0] - table[1]) / n, mcnemar(*table), detectable(n, differ / n), differ / n)


def _resolution(
    tied: Sequence[RecipePair | None], rivals: Sequence[RecipePair | None], best: _Scored, top: Score
) -> tuple[float | None, Basis, float]:
    """Return the smallest detectable difference, its basis, and the share of items behind it.

    The pair that disagrees most is the hardest to separate, so it stands for the group. Ties take precedence: a pair with a
    large difference is no guide to close pairs.
    """
    both: tuple[tuple[Basis, Sequence[RecipePair | None]], ...] = (("tied", tied), ("all", rivals))
    for basis, pairs in both:
        known = [pair for pair in pairs if pair and pair.detectable > 0]
        if known:
            hardest = max(known, key=lambda pair: pair.detectable)
            if hardest.disagreement is None:
                return hardest.detectable, "seeds", 0.0
            return hardest.detectable, basis, hardest.disagreement
    share, first = 2 * top.value * (1 - top.value), _scored(best[0])
    return (detectable(len(first.items), share) if first and first.items else None), "independent", share


def _discordant(left: Accuracy, right: Accuracy) -> tuple[int, int] | None:
    """Count the items that only `left`, and that only `right` got right; None unless both scored the same items."""
    a, b = {i.id: i.correct for i in left.items}, {i.id: i.correct for i in right.items}
    if not a or a.keys() != b.keys() or len(a) != len(left.items) or len(b) != len(right.items):
        return None
    return sum(a[i] > b[i] for i in a), sum(b[i] > a[i] for i in a)
