"""Convert the verdict on pairs of runs to rows, so that pairs can have the same outputs as `gate RUN --baseline`."""

from __future__ import annotations

from harness.analysis.comparison.baseline_rows import ComparisonRow, GateResult, RowKind
from harness.analysis.comparison.pair_ratio import metric_text
from harness.analysis.comparison.pair_verdict import CellComparison, JudgedPairs
from harness.analysis.statistics.paired import PairFinding
from harness.analysis.tracked_metrics import STEP
from harness.analysis.verdict_kind import Verdict, VerdictKind

_KINDS = {
    PairFinding.SLOWER: VerdictKind.FAIL,
    PairFinding.FASTER: VerdictKind.PASS,
    PairFinding.SAME: VerdictKind.PASS,
    PairFinding.INCONCLUSIVE: VerdictKind.INCONCLUSIVE,
}


def gate_result(judged: JudgedPairs, interrupted: str = "") -> GateResult:
    """Return the verdict with its rows: first the rows of `judged`, then one row for each time of a Cell.

    interrupted: how the pairs were interrupted; empty if they were not.
    """
    verdict = judged.verdict
    rows = [*judged.rows, *(_speed(cell, metric, judged) for cell in judged.cells for metric in cell.timed or (STEP,))]
    reason = f"{verdict.reason}; {judged.canaries.sentence}"
    word = verdict.word
    if interrupted:
        rows.append(ComparisonRow(RowKind.MISSING, VerdictKind.NOT_RUN, "all Cells", (), "pairs", interrupted))
        word, reason = word if word is VerdictKind.FAIL else VerdictKind.NOT_RUN, f"{interrupted}; {reason}"
    compared = sum(bool(cell.timed) for cell in judged.cells) or len(judged.rows)
    return GateResult(verdict=Verdict(word, reason, verdict.records), rows=tuple(rows), compared=compared)


def _speed(cell: CellComparison, metric: str, judged: JudgedPairs) -> ComparisonRow:
    timed, old, new = cell.timed.get(metric), cell.seconds(0, metric), cell.seconds(1, metric)
    ids = tuple(dict.fromkeys(record.cell_id for pair in cell.records for record in pair))
    if timed is None:
        why = f"not timed: {cell.because or 'it has no steps that could be timed'}"
        return ComparisonRow(
            RowKind.SPEED, VerdictKind.NOT_RUN, cell.name, ids, metric_text(metric), why, old, new, "s"
        )
    word, reason = _KINDS[timed.word], timed.sentence.removeprefix("inconclusive: ")
    if judged.canaries.closed:
        word, reason = VerdictKind.NOT_RUN, f"too many canaries raised the alarm, so this is not judged: {reason}"
    return ComparisonRow(
        RowKind.SPEED, word, cell.name, ids, metric_text(metric), reason, old, new, "s", timed.interval
    )
