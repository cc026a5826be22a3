"""Accuracies of a run compared with its baseline: the same items and seeds, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.analysis.comparison.baseline_rows import ONE_SEED, ComparisonRow, FindingKind, Margins
from harness.analysis.ranking import RecipePair
from harness.analysis.statistics import over_seeds
from harness.analysis.statistics.intervals import LEVEL, holm, paired_difference
from harness.analysis.verdict_kind import VerdictKind
from harness.records.record import Accuracy, Record

_Matched = tuple[Record, Record]


@dataclass(frozen=True)
class _Difference:
    """Difference of two accuracies, new minus base."""

    value: float
    interval: tuple[float, float]
    p: float
    """p value of no difference."""
    detectable: float
    """Smallest difference that this comparison can show."""


def rows(
    pairs: Sequence[_Matched], recipe_ids: Mapping[str, str], names: Mapping[str, str], margins: Margins
) -> list[ComparisonRow]:
    """Compare the accuracies of Cells with two ok Records; Cells that differ only in the seed are compared together.

    pairs: of the baseline and of the run. recipe_ids: by cell_id. names: by recipe_id.
    """
    recipes: dict[str, list[_Matched]] = {}
    found = []
    for base, new in sorted(pairs, key=lambda pair: pair[0].cell.seed):
        a, b = _scored(base), _scored(new)
        recipe = recipe_ids[base.cell_id]
        name = names[recipe]
        if a and b:
            recipes.setdefault(recipe, []).append((base, new))
        elif a:
            reason = f"seed {base.cell.seed} was scored in the baseline, and is not now"
            found.append(_row(FindingKind.MISSING, VerdictKind.FAIL, name, [(base, new)], reason))
        elif b:
            reason = f"seed {base.cell.seed} was not scored in the baseline"
            found.append(_row(FindingKind.NEW, VerdictKind.NOT_RUN, name, [(base, new)], reason))
    differences = {recipe: _difference(same) for recipe, same in recipes.items()}
    # Equal answers cannot differ by chance, so they do not count among the tests to correct for.
    adjusted = holm({r: d.p for r, d in differences.items() if isinstance(d, _Difference)})
    for recipe, same in recipes.items():
        difference = differences[recipe]
        if isinstance(difference, _Difference):
            word, reason = _judge(difference, adjusted[recipe], margins.accuracy)
            interval: tuple[float, float] | None = difference.interval
        else:
            word, reason, interval = (*difference, None)
        found.append(_row(FindingKind.ACCURACY, word, names[recipe], same, f"{reason}; {_seeds(same)}", interval))
    return found


def _difference(pairs: Sequence[_Matched]) -> _Difference | tuple[VerdictKind, str]:
    """Return the difference, or a verdict and its reason if there is nothing to estimate."""
    base, new = ([a for r in side if (a := _scored(r)) is not None] for side in zip(*pairs, strict=True))
    metrics = dict.fromkeys(a.metric for a in (*base, *new))
    if len(metrics) > 1:
        return VerdictKind.INCONCLUSIVE, f"not comparable, two metrics: {', '.join(metrics)}"
    if all(_answers(a) == _answers(b) for a, b in zip(base, new, strict=True)):
        return VerdictKind.PASS, "the same answers"
    if len(pairs) > 1:
        spread = over_seeds.paired(new, base)
        if spread is not None:
            return _Difference(spread.value, spread.interval, spread.p, spread.detectable)
    elif (test := RecipePair.of([pairs[0][1]], [pairs[0][0]])) is not None:
        interval = paired_difference(*_table(new[0], base[0]))
        return _Difference(test.difference, interval, test.p, test.detectable)
    return VerdictKind.INCONCLUSIVE, "not comparable: other items were scored"


def _judge(d: _Difference, p: float, margin: float) -> tuple[VerdictKind, str]:
    low, high = d.interval
    stated = f"margin {100 * margin:g} points; it would have found {100 * d.detectable:.1f} points"
    if low > -margin:
        rose = d.value > 0 and p <= 1 - LEVEL
        return VerdictKind.PASS, f"rose ({stated})" if rose else f"no worse by the margin ({stated})"
    if d.value < 0 and p <= 1 - LEVEL:
        return VerdictKind.FAIL, f"dropped ({stated}, p = {p:.2g} over all comparisons)"
    luck = "; below 0 alone, not among so many comparisons" if high < 0 else ""
    return VerdictKind.INCONCLUSIVE, f"undecided ({stated}){luck}"


def _row(
    kind: FindingKind, word: VerdictKind, name: str, pairs: Sequence[_Matched], reason: str,
    interval: tuple[float, float] | None = None,
) -> ComparisonRow:  # fmt: skip
    base, new = (
        fmean(a.value for a in scored) if (scored := [a for r in side if (a := _scored(r)) is not None]) else None
        for side in zip(*pairs, strict=True)
    )
    cells = tuple(b.cell_id for b, _ in pairs)
    ids = tuple(r.id for pair in pairs for r in pair)
    return ComparisonRow(kind, word, name, cells, "accuracy", reason, base, new, "share", interval, ids)


def _seeds(pairs: Sequence[_Matched]) -> str:
    if len(pairs) == 1:
        return ONE_SEED
    return f"seeds {', '.join(str(b.cell.seed) for b, _ in pairs)}"


def _scored(record: Record) -> Accuracy | None:
    return record.measurements.accuracy if record.measurements else None


def _answers(a: Accuracy) -> dict[str, int]:
    return {i.id: i.correct for i in a.items}


def _table(left: Accuracy, right: Accuracy) -> tuple[int, int, int, int]:
    """Count the items that both, only `left`, only `right` and neither got right. Both scored the same items."""
    other = _answers(right)
    answers = [(i.correct, other[i.id]) for i in left.items]
    return answers.count((1, 1)), answers.count((1, 0)), answers.count((0, 1)), answers.count((0, 0))
