"""Rankings of recipes by accuracy within equal budgets. Recipes are tied if no test finds a difference between them.

A recipe is a set of Cells that differ only in the seed. A budget consists of the settings that must be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal

from harness.analysis.grouping import group
from harness.analysis.statistics import over_seeds, seed_spread
from harness.analysis.statistics.intervals import LEVEL, detectable, holm, mcnemar, paired_difference, wilson
from harness.analysis.statistics.over_seeds import Spread
from harness.analysis.statistics.seed_spread import Prior
from harness.records.record import Accuracy, Cell, Record
from harness.records.store import Run

Standing = Literal["best", "tied", "below", "untrained"]
Basis = Literal["tied", "all", "independent", "seeds"]
Priors = tuple[Prior | None, Prior | None]


@dataclass(frozen=True)
class Budget:
    """Settings that must be equal before two accuracies may be ranked.

    Learning rates may differ, because each method chooses its own. `accumulate`, `checkpointing`, `compile`,
    `layerwise` and `loop` may differ, because they change the cost of a step, but not its result. Optimizers may
    differ, because names and reports show them.
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
        t, e = cell.training, cell.evaluation
        return cls(cell.model, cell.task, cell.dtype, t.steps, t.batch, t.max_tokens, e.items, e.skip)

    def same_test(self, other: Budget) -> bool:
        """Return whether both budgets are equal except for the number of steps and the batch size.

        If so, Cells with these budgets score the same items in the same way.
        """
        return replace(self, steps=other.steps, batch=other.batch) == other


def why_not_comparable(left: Cell, right: Cell) -> str:
    """Return the reason why the accuracies of two Cells may not be compared. If they may, return an empty string.

    If at least one of the Cells is untrained, the number of steps and the batch size are ignored.
    """
    a, b = Budget.of(left), Budget.of(right)
    untrained = 0 in (a.steps, b.steps)
    if a == b or (untrained and a.same_test(b)):
        return ""
    ignored = ("steps", "batch") if untrained else ()
    unequal = {name: value for name, value in vars(a).items() if name not in ignored and value != getattr(b, name)}
    return ", ".join(f"{name} {value} against {getattr(b, name)}" for name, value in unequal.items())


@dataclass(frozen=True)
class Score:
    """Accuracy of one Record, or mean accuracy of several Records with different seeds, with its interval."""

    value: float
    low: float
    high: float
    means: str
    """Explanation of the interval from `low` to `high`: how it is computed and what it covers."""


@dataclass(frozen=True)
class RankingEntry:
    """Place of one recipe in its group."""

    records: tuple[Record, ...]
    """Records of the recipe, in the order of the seeds."""
    score: Score
    """Accuracy of the recipe, with its interval."""
    standing: Standing
    """Place relative to the best recipe: `best`, `below` if the recipe is significantly less accurate, or `tied` if
    not. An untrained recipe is `untrained`."""
    difference: float = 0.0
    """Accuracy of this recipe minus the accuracy of the best recipe."""
    p: float | None = None
    """p value of the paired test against the best recipe, adjusted for the number of tests in the group. It is None for
    the best recipe, and for a recipe that was scored on other items. In the second case, `standing` rests on the
    intervals alone."""

    @property
    def record(self) -> Record:
        """The Record of the first seed. Use it only for facts that are equal for all seeds."""
        return self.records[0]

    def typical(self, read: Callable[[Record], float | None]) -> float | None:
        """Return the median, over the seeds, of the values that `read` returns. If no seed has a value, return None."""
        values = [value for record in self.records if (value := read(record)) is not None]
        return median(values) if values else None


@dataclass(frozen=True)
class Group:
    """Recipes with one budget: trained recipes, best first, then untrained recipes."""

    budget: Budget
    """Budget of all recipes in the group."""
    ranked: tuple[RankingEntry, ...]
    """Trained recipes, best first."""
    untrained: tuple[RankingEntry, ...]
    """Untrained recipes."""
    seeds: tuple[int, ...]
    """Seeds with which the recipes were run."""
    tries: int
    """Number of learning rates that were scored before the suite chose the learning rate of each recipe."""
    detectable: float | None
    """Smallest true difference between two accuracies that one comparison in this group finds with 80 % power. None if
    there is nothing to compare."""
    disagreement: float
    """Share of items that two recipes answered differently; `basis` names these recipes. `detectable` is computed from
    this share. It is 0 if `basis` is `seeds`."""
    basis: Basis
    """Data from which `detectable` is computed.

    - `tied`: the answers of the best recipe, and of the tied recipe that disagrees most with the best.
    - `all`: the answers of the best recipe, and of the recipe in the whole group that disagrees most with the best.
    - `independent`: the accuracy of the best recipe, if the answers of two recipes are assumed to be independent.
    - `seeds`: with several seeds, the largest standard error of a difference from the best recipe."""

    @property
    def entries(self) -> tuple[RankingEntry, ...]:
        """All entries: first the trained recipes, then the untrained."""
        return self.ranked + self.untrained

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers of the trained Cells, by their names in suites."""
        return tuple(dict.fromkeys(e.record.cell.optimizer for e in self.ranked))

    @property
    def is_ranking(self) -> bool:
        """True if the group has more than one trained recipe."""
        return len(self.ranked) > 1

    @property
    def data_differ(self) -> bool:
        """True if two runs with the same seed trained on different examples, or in a different order."""
        trained = ((r.cell.seed, r.training) for e in self.ranked for r in e.records)
        orders = {(seed, t.data_order_sha256) for seed, t in trained if t and t.data_order_sha256}
        return len(orders) > len({seed for seed, _ in orders})


_Recipe = tuple[Record, ...]
"""Scored Records of one recipe, in the order of the seeds."""
_Place = tuple[Budget, tuple[int, ...], int]


def groups(run: Run) -> tuple[Group, ...]:
    """Return the scored recipes of a run, grouped by budget, seeds and `Group.tries`, in the order of the run's Cells.

    A recipe that lacks a seed gets a separate group: its mean over fewer seeds must not be ranked among means over all
    seeds. Cells that only searched for a learning rate are not ranked.
    """
    latest = run.latest()
    swept = {cell_id for tuning in run.manifest.tuning for cell_id in tuning.sweep}
    tries = {
        cell_id: sum(i in latest and latest[i].accuracy is not None for i in tuning.sweep)
        for tuning in run.manifest.tuning
        for cell_id in tuning.cells
    }
    scored = [record for record in latest.values() if record.cell_id not in swept and record.accuracy is not None]
    recipes = [
        tuple(sorted(records, key=lambda record: record.cell.seed))
        for records in group((record.cell.recipe_id, record) for record in scored).values()
    ]

    def place(records: _Recipe) -> _Place:
        cell, seeds = records[0].cell, tuple(record.cell.seed for record in records)
        return Budget.of(cell), seeds if len(seeds) > 1 else (), tries.get(cell.cell_id, 0)

    trained = group((place(records), records) for records in recipes if records[0].cell.training.steps)
    untrained = group(
        (Budget.of(records[0].cell), records) for records in recipes if not records[0].cell.training.steps
    )
    ranked = [
        _group(budget, tried, same, [u for other, found in untrained.items() if other.same_test(budget) for u in found])
        for (budget, _, tried), same in trained.items()
    ]
    unranked = [
        _group(budget, 0, [], same)
        for budget, same in untrained.items()
        if not any(budget.same_test(other) for other, _, _ in trained)
    ]
    return tuple(ranked + unranked)


def score(records: Sequence[Record], prior: Prior | None = None) -> Score:
    """Return the accuracy of one Record, or the mean accuracy of several Records.

    The interval of a mean is valid for new seeds and new items. prior: the spread of accuracies over seeds, estimated
    from all recipes of the group; None if it is unknown.
    """
    scored = accuracies(records)
    if len(scored) == 1:
        (only,) = scored
        return Score(only.value, only.low, only.high, only.interval)
    found = over_seeds.mean(scored, prior)
    if found is None:
        return Score(fmean(a.value for a in scored), 0.0, 1.0, "none: the runs did not score the same items")
    low, high = found.interval
    if not found.error:  # all answers are correct, or all are wrong: the next item is still uncertain
        low, high = wilson(round(found.value * (n := len(scored[0].items))), n)
    how = over_seeds.MODERATED if prior else over_seeds.INTERVAL
    return Score(found.value, max(0.0, low), min(1.0, high), how)


def accuracies(records: Sequence[Record]) -> list[Accuracy]:
    """Return the accuracy of each Record that has one."""
    return [r.accuracy for r in records if r.accuracy is not None]


def _group(budget: Budget, tries: int, trained: Sequence[_Recipe], untrained: Sequence[_Recipe]) -> Group:
    # Untrained Cells do not depend on the seed, so they carry no information about the spread of others.
    spread = seed_spread.prior([accuracies(records) for records in trained])
    priors = {records[0].id: spread for records in trained}
    scores = {records[0].id: score(records, priors.get(records[0].id)) for records in (*trained, *untrained)}
    trained, untrained = (
        sorted(recipes, key=lambda records: -scores[records[0].id].value) for recipes in (trained, untrained)
    )
    best, *others = *trained, *untrained
    top = scores[best[0].id]
    pairs = {r[0].id: RecipePair.of(best, r, (priors.get(best[0].id), priors.get(r[0].id))) for r in others}
    # These items also chose the best recipe, so all pairs of recipes count as tests, not only the pairs with the best.
    tests = len(scores) * (len(scores) - 1) // 2
    p = holm({i: pair.p for i, pair in pairs.items() if pair is not None}, tests)

    def standing(i: str) -> Standing:
        if i == best[0].id:
            return "best"
        return "below" if (p[i] <= 1 - LEVEL if i in p else scores[i].high < top.low) else "tied"

    def entry(records: _Recipe, standing: Standing) -> RankingEntry:
        found = scores[records[0].id]
        return RankingEntry(records, found, standing, found.value - top.value, p.get(records[0].id))

    ranked = tuple(entry(records, standing(records[0].id)) for records in trained)
    rivals = [pairs[records[0].id] for records in trained[1:] or others]
    tied = [pairs[e.record.id] for e in ranked if e.standing == "tied"]
    detects, basis, disagreement = _resolution(tied, rivals, best, top)
    return Group(
        budget=budget,
        ranked=ranked,
        untrained=tuple(entry(records, "untrained") for records in untrained),
        seeds=tuple(sorted({r.cell.seed for records in (trained or untrained) for r in records})),
        tries=tries,
        detectable=detects if rivals else None,
        disagreement=disagreement,
        basis=basis,
    )


@dataclass(frozen=True)
class RecipePair:
    """Comparison of two recipes on the same items."""

    difference: float
    """Accuracy of the left recipe minus the accuracy of the right recipe."""
    interval: tuple[float, float]
    """Interval of the difference."""
    p: float
    """p value for the hypothesis of no difference."""
    detectable: float
    """Smallest true difference that a comparison with as much data finds with 80 % power."""
    disagreement: float | None = None
    """Share of items that exactly one of the two recipes answered correctly. None if each recipe has several seeds."""

    @classmethod
    def of(cls, left: Sequence[Record], right: Sequence[Record], priors: Priors = (None, None)) -> RecipePair | None:
        """Compare two recipes. Return None if their items differ, or if only one recipe has several runs.

        priors: for each recipe, the spread of accuracies over seeds, estimated from all recipes of the group.
        """
        a, b = accuracies(left), accuracies(right)
        if (len(a) > 1) != (len(b) > 1):
            return None
        return cls.of_runs(a[0], b[0]) if len(a) == 1 else cls.of_spread(over_seeds.difference(a, b, priors))

    @classmethod
    def of_spread(cls, spread: Spread | None) -> RecipePair | None:
        """Return the comparison of two recipes from their difference over several seeds.

        spread: the difference, left - right, with its standard error. If it is None, return None.
        """
        return cls(spread.value, spread.interval, spread.p, spread.detectable) if spread else None

    @classmethod
    def of_runs(cls, left: Accuracy, right: Accuracy) -> RecipePair | None:
        """Compare two runs. If they did not score the same items, return None."""
        a, b, n = left.answers, right.answers, len(left.items)
        if not n or a.keys() != b.keys() or not len(a) == n == len(right.items):
            return None
        counts = Counter((a[i], b[i]) for i in a)
        both, only_left, only_right, neither = (counts[pair] for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
        disagreement = (only_left + only_right) / n
        interval = paired_difference(both, only_left, only_right, neither)
        p = mcnemar(only_left, only_right)
        return cls((only_left - only_right) / n, interval, p, detectable(n, disagreement), disagreement)


def _resolution(
    tied: Sequence[RecipePair | None], rivals: Sequence[RecipePair | None], best: _Recipe, top: Score
) -> tuple[float | None, Basis, float]:
    """Return the smallest detectable difference, its basis, and the share of items that were answered differently.

    tied: comparisons of the best recipe with each tied recipe. rivals: comparisons of the best recipe with every other
    recipe. top: score of the best recipe. The pair that disagrees most represents the group, because it is the hardest
    to separate. A pair of tied recipes is preferred, because a pair with a large difference says little about close
    pairs.
    """
    both: tuple[tuple[Basis, Sequence[RecipePair | None]], ...] = (("tied", tied), ("all", rivals))
    for basis, pairs in both:
        known = [pair for pair in pairs if pair and pair.detectable > 0]
        if known:
            hardest = max(known, key=lambda pair: pair.detectable)
            if hardest.disagreement is None:
                return hardest.detectable, "seeds", 0.0
            return hardest.detectable, basis, hardest.disagreement
    share, first = 2 * top.value * (1 - top.value), best[0].accuracy
    return (detectable(len(first.items), share) if first and first.items else None), "independent", share
