"""The verdict on pairs as rows, for the outputs that `gate RUN --baseline` has too."""

from __future__ import annotations

from harness.analysis.comparison.baseline_rows import Findings, Kind, Row
from harness.analysis.comparison.pair_ratio import named
from harness.analysis.comparison.pair_verdict import Judged, Sides
from harness.analysis.statistics.paired import Finding
from harness.analysis.tracked_metrics import STEP
from harness.analysis.verdict_kind import Verdict, Word

_WORDS = {
    Finding.SLOWER: Word.FAIL, Finding.FASTER: Word.PASS, Finding.SAME: Word.PASS, Finding.INCONCLUSIVE: Word.INCONCLUSIVE,
}  # fmt: skip


def findings(judged: Judged, cut: str = "") -> Findings:
    """Return a row for each time of a Cell beside the rows of all else. cut: how the pairs were cut short, if they were."""
    verdict = judged.verdict
    rows = [*judged.rows, *(_speed(cell, metric, judged) for cell in judged.cells for metric in cell.timed or (STEP,))]
    reason = f"{verdict.reason}; {judged.canaries.sentence}"
    word = verdict.word
    if cut:
        rows.append(Row(Kind.MISSING, Word.NOT_RUN, "all Cells", (), "pairs", cut))
        word, reason = word if word is Word.FAIL else Word.NOT_RUN, f"{cut}; {reason}"
    compared = sum(bool(cell.timed) for cell in judged.cells) or len(judged.rows)
    return Findings(verdict=Verdict(word, reason, verdict.records), rows=tuple(rows), compared=compared)


def _speed(cell: Sides, metric: str, judged: Judged) -> Row:
    timed, old, new = cell.timed.get(metric), cell.seconds(0, metric), cell.seconds(1, metric)
    ids = tuple(dict.fromkeys(record.cell_id for pair in cell.records for record in pair))
    if timed is None:
        why = f"not timed: {cell.because or 'it has no steps that could be timed'}"
        return Row(Kind.SPEED, Word.NOT_RUN, cell.name, ids, named(metric), why, old, new, "s")
    word, reason = _WORDS[timed.word], timed.sentence.removeprefix("inconclusive: ")
    if judged.canaries.closed:
        word, reason = Word.NOT_RUN, f"the canaries closed the gate, so this is not judged: {reason}"
    return Row(Kind.SPEED, word, cell.name, ids, named(metric), reason, old, new, "s", timed.interval)
