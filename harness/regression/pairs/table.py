"""Text of the verdict on pairs: one row for each time of a Cell, then other findings, the canaries and the verdict."""

from __future__ import annotations

from harness.analysis.comparison.baseline_costs import PEAK
from harness.analysis.comparison.pair_verdict import CellComparison, JudgedPairs
from harness.analysis.tracked_metrics import STEP
from harness.analysis.verdict_kind import VerdictKind
from harness.console import align_columns

_HEAD = ["Cell", "verdict", "old ms", "new ms", "change", "95 % interval", "adjusted p", "finds"]


def lines(judged: JudgedPairs) -> list[str]:
    """Return the verdict on pairs of runs as lines of text.

    The column `finds` has the smallest slow-down that the planned pairs find with a power of 80 %.
    """
    rows = [_row(cell, metric, judged) for cell in judged.cells for metric in cell.timed or (STEP,)]
    found = [*align_columns([_HEAD, *rows], right=range(2, len(_HEAD)), indent=""), ""]
    untimed = [cell for cell in judged.cells if not cell.timed]
    found += [f"not timed: {cell.name}: {cell.because or 'it has no steps that could be timed'}" for cell in untimed]
    for row in judged.rows:
        if row.word is not VerdictKind.PASS or (row.delta and not row.same and row.what != PEAK):
            values = "" if row.base is None or row.new is None else f" ({row.base} -> {row.new})"
            found.append(f"{row.word.value}: {row.name}: {row.what} {row.reason}{values}")
    found.append(judged.canaries.sentence)
    found.append(f"{judged.verdict.word.value}: {judged.verdict.reason}")
    return found


def _row(cell: CellComparison, metric: str, judged: JudgedPairs) -> list[str]:
    old, new = cell.seconds(0, metric), cell.seconds(1, metric)
    times = [f"{1e3 * s:.2f}" if s is not None else "-" for s in (old, new)]
    v = cell.timed.get(metric)
    if v is None:
        return [cell.name, "not timed", *times, "-", "-", "-", "-"]
    low, high = v.interval
    return [
        cell.title(metric), v.word.value, *times, f"{100 * v.effect:+.1f} %", f"[{100 * low:+.1f}, {100 * high:+.1f}]",
        f"{judged.adjusted[cell.title(metric)]:.2g}", "-" if v.mde80 is None else f"{100 * v.mde80:.1f} %",
    ]  # fmt: skip
