"""Which Cell scores best, among Cells with the same budget only, with ties drawn as ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.analysis.intervals import LEVEL, detectable, holm, mcnemar
from harness.records import Accuracy, Cell, Record
from harness.store import Run

Standing = Literal["best", "tied", "below", "untrained"]
Basis = Literal["tied", "all", "independent"]


@dataclass(frozen=True)
class Budget:
    """What must be equal before two accuracies may be ranked.

    The learning rates are each method's own to choose. `accumulate` and `checkpointing` change what a step costs and not
    what it learns. The optimizer may differ, which every name says and the report besides: see `Group.optimizers`.
    """

    model: str
    task: str
    dtype: str
    steps: int
    batch: int
    max_tokens: int
    items: int

    @classmethod
    def of(cls, cell: Cell) -> Budget:
        """Return the budget of a Cell."""
        t = cell.training
        return cls(cell.model, cell.task, cell.dtype, t.steps, t.batch, t.max_tokens, cell.evaluation.items)

    def same_test(self, other: Budget) -> bool:
        """Say whether both score the same items in the same way, however they were trained."""
        mine = (self.model, self.task, self.dtype, self.max_tokens, self.items)
        return mine == (other.model, other.task, other.dtype, other.max_tokens, other.items)


def why_not_comparable(left: Cell, right: Cell) -> str:
    """Say why two accuracies may not be compared, or return an empty string. An untrained Cell spent no budget."""
    a, b = Budget.of(left), Budget.of(right)
    untrained = 0 in (a.steps, b.steps)
    if a == b or (untrained and a.same_test(b)):
        return ""
    skip = ("steps", "batch") if untrained else ()
    unequal = [name for name in Budget.__annotations__ if name not in skip and getattr(a, name) != getattr(b, name)]
    return ", ".join(f"{name} {getattr(a, name)} against {getattr(b, name)}" for name in unequal)


@dataclass(frozen=True)
class Entry:
    """One Cell's place in its group.

    difference: its accuracy minus the best one's. p: of the exact paired test against the best, adjusted for the number
    of tests in the group; None where the items differ, so that only the intervals could be compared.
    """

    record: Record
    accuracy: Accuracy
    standing: Standing
    difference: float = 0.0
    p: float | None = None


@dataclass(frozen=True)
class Group:
    """Cells with one budget, best first, then what was not trained at all.

    detectable: the smallest difference that one comparison in this group can find; None with nothing to compare.
    disagreement: the share of items it was computed from: observed between the best and the Cell that differs from it
    most, among those `tied` with it or among `all`, or assumed for `independent` answers.
    """

    budget: Budget
    ranked: tuple[Entry, ...]
    untrained: tuple[Entry, ...]
    seeds: tuple[int, ...]
    detectable: float | None
    disagreement: float
    basis: Basis

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, ranked ones first."""
        return self.ranked + self.untrained

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers that its trained Cells were stepped by, as suites call them."""
        return tuple(dict.fromkeys(e.record.cell.optimizer for e in self.ranked))

    @property
    def is_ranking(self) -> bool:
        """Say whether there is more than one trained Cell to rank."""
        return len(self.ranked) > 1


def groups(run: Run) -> tuple[Group, ...]:
    """Sort a run's accuracies into groups of equal budget, in the order of the manifest."""
    trained: dict[Budget, list[tuple[Record, Accuracy]]] = {}
    untrained: list[tuple[Record, Accuracy]] = []
    for record in run.latest().values():
        if record.measurements is None or record.measurements.accuracy is None:
            continue
        scored = (record, record.measurements.accuracy)
        if record.cell.training.steps:
            trained.setdefault(Budget.of(record.cell), []).append(scored)
        else:
            untrained.append(scored)
    found = [
        _group(budget, scored, [u for u in untrained if Budget.of(u[0].cell).same_test(budget)])
        for budget, scored in trained.items()
    ]
    alone: dict[Budget, list[tuple[Record, Accuracy]]] = {}
    for item in untrained:
        if not any(Budget.of(item[0].cell).same_test(budget) for budget in trained):
            alone.setdefault(Budget.of(item[0].cell), []).append(item)
    return tuple(found + [_group(budget, [], scored) for budget, scored in alone.items()])


def _group(
    budget: Budget, scored: Sequence[tuple[Record, Accuracy]], untrained: Sequence[tuple[Record, Accuracy]]
) -> Group:
    ordered = sorted(scored, key=lambda pair: -pair[1].value)
    everyone = [*ordered, *sorted(untrained, key=lambda pair: -pair[1].value)]
    best_record, best = everyone[0]
    tables = {record.id: _discordant(best, accuracy) for record, accuracy in everyone if record is not best_record}
    # Which Cell is best was read off the same items, so every pair was looked at, not only those with the best one.
    pairs = len(everyone) * (len(everyone) - 1) // 2
    p = holm({i: mcnemar(*table) for i, table in tables.items() if table is not None}, pairs)

    def entry(record: Record, accuracy: Accuracy, standing: Standing | None) -> Entry:
        own = p.get(record.id)
        if standing is None:
            apart = own <= 1 - LEVEL if own is not None else accuracy.high < best.low
            standing = "best" if record is best_record else "below" if apart else "tied"
        return Entry(record, accuracy, standing, accuracy.value - best.value, own)

    ranked = tuple(entry(r, a, None) for r, a in ordered)
    rivals = ordered[1:] or [pair for pair in everyone if pair[0] is not best_record]
    tied = [e.record for e in ranked if e.standing == "tied"]
    basis, disagreement = _disagreement([tables[r.id] for r in tied], [tables[r.id] for r, _ in rivals], best)
    return Group(
        budget=budget,
        ranked=ranked,
        untrained=tuple(entry(r, a, "untrained") for r, a in everyone[len(ordered) :]),
        seeds=tuple(sorted({r.cell.seed for r, _ in everyone})),
        detectable=detectable(len(best.items), disagreement) if rivals and best.items else None,
        disagreement=disagreement,
        basis=basis,
    )


def _disagreement(
    tied: Sequence[tuple[int, int] | None], rivals: Sequence[tuple[int, int] | None], best: Accuracy
) -> tuple[Basis, float]:
    """Return the share of items that tells how small a difference can be found.

    The pair that disagrees most is the hardest to tell apart, so it speaks for the group. Ties come first: a Cell that
    lies far below says nothing of how well close ones are told apart.
    """
    if most := max((sum(table) for table in tied if table), default=0):
        return "tied", most / len(best.items)
    if most := max((sum(table) for table in rivals if table), default=0):
        return "all", most / len(best.items)
    return "independent", 2 * best.value * (1 - best.value)


def _discordant(left: Accuracy, right: Accuracy) -> tuple[int, int] | None:
    """Count the items that only `left`, and that only `right` got right; None unless both scored the same items."""
    a, b = {i.id: i.correct for i in left.items}, {i.id: i.correct for i in right.items}
    if not a or a.keys() != b.keys() or len(a) != len(left.items) or len(b) != len(right.items):
        return None
    return sum(a[i] > b[i] for i in a), sum(b[i] > a[i] for i in a)
