"""Comparison of the accuracies of a run with the accuracies of its baseline, paired by test item and by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from harness.analysis.comparison.baseline_rows import ONE_SEED, ComparisonRow, Margins, RowKind
from harness.analysis.grouping import group
from harness.analysis.ranking import RecipePair, accuracies
from harness.analysis.statistics import over_seeds
from harness.analysis.statistics.intervals import LEVEL, holm
from harness.analysis.verdict_kind import VerdictKind
from harness.records.record import Record

_Matched = tuple[Record, Record]


def rows(pairs: Sequence[_Matched], names: Mapping[str, str], margins: Margins) -> list[ComparisonRow]:
    """Return rows that compare accuracies. Cells that differ only in the seed (a recipe) share one row.

    pairs: for each Cell, its Record in the baseline and its Record in the run. names: names of recipes, by recipe_id.
    """
    found = []
    pairs = sorted(pairs, key=lambda pair: pair[0].cell.seed)
    recipes = group((pair[0].cell.recipe_id, pair) for pair in pairs if pair[0].accuracy and pair[1].accuracy)
    for base, new in pairs:
        name = names[base.cell.recipe_id]
        if base.accuracy and not new.accuracy:
            reason = f"seed {base.cell.seed} was scored in the baseline, and is not now"
            found.append(_row(RowKind.MISSING, VerdictKind.FAIL, name, [(base, new)], reason))
        elif new.accuracy and not base.accuracy:
            reason = f"seed {base.cell.seed} was not scored in the baseline"
            found.append(_row(RowKind.NEW, VerdictKind.NOT_RUN, name, [(base, new)], reason))
    differences = {recipe: _difference(same) for recipe, same in recipes.items()}
    # Equal answers on both sides need no test, so such a recipe does not count in the adjustment for several tests.
    adjusted = holm({r: d.p for r, d in differences.items() if isinstance(d, RecipePair)})
    for recipe, same in recipes.items():
        difference = differences[recipe]
        if isinstance(difference, RecipePair):
            word, reason = _judge(difference, adjusted[recipe], margins.accuracy)
            interval: tuple[float, float] | None = difference.interval
        else:
            word, reason, interval = (*difference, None)
        found.append(_row(RowKind.ACCURACY, word, names[recipe], same, f"{reason}; {_seeds(same)}", interval))
    return found


def _difference(pairs: Sequence[_Matched]) -> RecipePair | tuple[VerdictKind, str]:
    """Return the difference between the accuracies of one recipe: run minus baseline.

    If all answers are equal, or if no difference can be estimated, return a verdict and its reason instead. pairs: for
    each seed, the Record in the baseline and the Record in the run.
    """
    base, new = (accuracies(side) for side in zip(*pairs, strict=True))
    metrics = dict.fromkeys(a.metric for a in (*base, *new))
    if len(metrics) > 1:
        return VerdictKind.INCONCLUSIVE, f"not comparable: two metrics, {', '.join(metrics)}"
    if all(a.answers == b.answers for a, b in zip(base, new, strict=True)):
        return VerdictKind.PASS, "the same answers"
    several = len(pairs) > 1
    found = RecipePair.of_spread(over_seeds.paired(new, base)) if several else RecipePair.of_runs(new[0], base[0])
    return found or (VerdictKind.INCONCLUSIVE, "not comparable: other items were scored")


def _judge(d: RecipePair, p: float, margin: float) -> tuple[VerdictKind, str]:
    low, high = d.interval
    stated = f"margin {100 * margin:g} points; smallest detectable drop {100 * d.detectable:.1f} points"
    if low > -margin:
        rose = d.difference > 0 and p <= 1 - LEVEL
        return VerdictKind.PASS, f"rose ({stated})" if rose else f"not worse by more than the margin ({stated})"
    if d.difference < 0 and p <= 1 - LEVEL:
        return VerdictKind.FAIL, f"dropped ({stated}, p = {p:.2g} over all comparisons)"
    exception = "; significant alone, but not among all comparisons" if high < 0 else ""
    return VerdictKind.INCONCLUSIVE, f"undecided ({stated}){exception}"


def _row(
    kind: RowKind, word: VerdictKind, name: str, pairs: Sequence[_Matched], reason: str,
    interval: tuple[float, float] | None = None,
) -> ComparisonRow:  # fmt: skip
    base, new = (
        fmean(a.value for a in scored) if (scored := accuracies(side)) else None for side in zip(*pairs, strict=True)
    )
    cells = tuple(b.cell_id for b, _ in pairs)
    ids = tuple(r.id for pair in pairs for r in pair)
    return ComparisonRow(kind, word, name, cells, "accuracy", reason, base, new, "share", interval, ids)


def _seeds(pairs: Sequence[_Matched]) -> str:
    return ONE_SEED if len(pairs) == 1 else f"seeds {', '.join(str(b.cell.seed) for b, _ in pairs)}"
