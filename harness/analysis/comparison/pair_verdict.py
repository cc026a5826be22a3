"""Verdict on two sides from pairs of process runs: times, memory and outcome of each Cell, and the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from harness.analysis import failed_checks
from harness.analysis.comparison import baseline_costs
from harness.analysis.comparison.baseline_costs import PEAK
from harness.analysis.comparison.baseline_rows import COUNTED_PEAK_B, ComparisonRow, FindingKind
from harness.analysis.comparison.environment_differences import clocks_of, slowed
from harness.analysis.comparison.pair_ratio import named, times
from harness.analysis.comparison.reproducibility import circumstances
from harness.analysis.contention import busy
from harness.analysis.metrics import COUNTED_PEAK, PEAK_ABOVE_IMPORTS, Metric, Number
from harness.analysis.statistics.canaries import Canaries
from harness.analysis.statistics.paired import PairFinding, family
from harness.analysis.statistics.paired import PairVerdict as Timed
from harness.analysis.tracked_metrics import STEP
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.errors import Exit
from harness.records.memory import ALLOCATED
from harness.records.record import Record, Status

Records = Sequence[tuple[Record, Record]]
_MEANT = ("code version", "implementation from")
"""Intended differences between the two sides."""
PEAK_B = 2**20
"""Difference of the medians of two process peaks that is no finding, however certain it is."""
_PEAK_LEVEL = 0.0011


@dataclass(frozen=True)
class CellComparison:
    """One Cell on both sides."""

    name: str
    """Name of the Cell."""
    records: Records
    """Pairs (old, new)."""
    timed: Mapping[str, Timed] = field(default_factory=dict)
    """Verdicts by metric; empty where nothing was timed."""
    because: str = ""
    """Reason for no verdicts."""

    def called(self, metric: str) -> str:
        """Return the Cell's name, with the metric unless it is the step."""
        return self.name if metric == STEP else f"{self.name}, {named(metric)}"

    def seconds(self, side: int, metric: str = STEP) -> float | None:
        """Return the median time over the process runs of a side (0 old, 1 new)."""
        found = [s for pair in self.records if (s := times(pair[side]).get(metric)) is not None]
        return median(found) if found else None


@dataclass(frozen=True)
class JudgedPairs:
    """Verdict on both sides."""

    verdict: Verdict
    """Verdict on all Cells together."""
    exit: Exit
    """Exit code of the gate."""
    cells: tuple[CellComparison, ...]
    """Comparisons of the Cells."""
    adjusted: Mapping[str, float]
    """Benjamini-Hochberg adjusted p of each time, by name."""
    rows: tuple[ComparisonRow, ...]
    """All comparisons but those of times."""
    canaries: Canaries
    """False alarms of the old side against itself."""
    residue: tuple[str, ...]
    """Unintended differences between the two sides, and disturbed process runs."""


def judge(cells: Sequence[CellComparison], canaries: Canaries, *, strict: bool = False) -> JudgedPairs:
    """Judge all Cells of one comparison.

    Exit codes, the first that applies: NOTHING_COMPARED if no Cell is ok on both sides; FAIL if a Cell is slower, takes more
    memory, has other counts, or is ok only on the old side; INFRASTRUCTURE if a Cell could not be timed, or if the canaries
    close the gate, which then judges no time; INCONCLUSIVE, with `strict`, if a time of a Cell is undecided, or if only some
    of its process runs counted their memory; otherwise PASS. Each time (step or latency) is judged separately, at the level
    of the Design, which keeps false alarms rare enough for 500 times. The adjusted p are only shown: ten or twenty pairs
    could not reach them. In simulations they would find +3 % in one Cell of 8 in 83 % of the gates instead of 99 %, and
    in one Cell of 50 in 53 %.
    """
    rows = [row for cell in cells for row in _rows(cell)]
    verdicts = {cell.called(metric): timed for cell in cells for metric, timed in cell.timed.items()}
    adjusted = family(verdicts)
    slower = [] if canaries.closed else [name for name, timed in verdicts.items() if timed.word is PairFinding.SLOWER]
    open_ = [name for name, timed in verdicts.items() if timed.word is PairFinding.INCONCLUSIVE]
    uncounted = [row for row in rows if row.word is VerdictKind.INCONCLUSIVE]
    red = [row for row in rows if row.word is VerdictKind.FAIL]
    timed = [c for c in cells if c.timed]
    lacking = [c for c in cells if not c.timed]
    word, code, reason = VerdictKind.PASS, Exit.PASS, f"none of {len(timed)} Cells is slower, larger or worse"
    if not timed and not red:
        word, code, reason = VerdictKind.NOT_RUN, Exit.NOTHING_COMPARED, "nothing was compared: no Cell could be timed"
    elif slower or red:
        told = [f"{name} is slower" for name in slower] + [f"{row.name}: {row.what} {row.reason}" for row in red]
        word, code, reason = VerdictKind.FAIL, Exit.FAIL, "; ".join(told)
    elif canaries.closed:
        word, code, reason = VerdictKind.NOT_RUN, Exit.INFRASTRUCTURE, f"no time was judged: {canaries.sentence}"
    elif lacking:
        told = [f"{c.name} ({c.because})" for c in lacking]
        word, code, reason = VerdictKind.NOT_RUN, Exit.INFRASTRUCTURE, f"not timed: {', '.join(told)}"
    elif open_ or uncounted:
        what = "Cells" if len(verdicts) == len(timed) else f"times of {len(timed)} Cells"
        told = [f"{len(open_)} of {len(verdicts)} {what} are neither slower nor proven the same"] if open_ else []
        told += [f"{row.name}: {row.what} {row.reason}" for row in uncounted]
        word, reason = VerdictKind.INCONCLUSIVE, "; ".join(told)
        code = Exit.INCONCLUSIVE if strict else Exit.PASS
    residue = _residue(cells)
    if residue:
        reason = "; ".join([reason, *(f"not the same: {what}" for what in residue)])
    records = tuple(record.id for cell in cells for pair in cell.records for record in pair)
    return JudgedPairs(Verdict(word, reason, records), code, tuple(cells), adjusted, tuple(rows), canaries, residue)


def _residue(cells: Sequence[CellComparison]) -> tuple[str, ...]:
    found: dict[str, int] = {}
    for cell in cells:
        for old, new in cell.records:
            changed = [what for what in circumstances(old, new) if not what.startswith(_MEANT)]
            for what in (*changed, *slowed(old, new)):
                found[what] = found.get(what, 0) + 1
    pairs = sum(len(cell.records) for cell in cells)
    told = [f"{what} ({count} of {pairs} pairs)" for what, count in found.items()]
    clocks = [clocks_of([pair[side] for cell in cells for pair in cell.records]) for side in (0, 1)]
    if clocks[0] != clocks[1]:
        told.append(f"SM clock as training ended: {clocks[0] or 'unknown'}, {clocks[1] or 'unknown'}")
    waited = sum(bool(busy(record)) for cell in cells for pair in cell.records for record in pair)
    return (*told, *([f"{waited} of {2 * pairs} process runs waited for a CPU"] if waited else []))


def _ok(pair: tuple[Record, Record]) -> bool:
    return all(record.status is Status.OK for record in pair)


def _rows(cell: CellComparison) -> list[ComparisonRow]:
    rows = [row for pair in cell.records if (row := _outcome(cell.name, pair))][:1]
    whole = [pair for pair in cell.records if _ok(pair)]
    if whole:
        rows += baseline_costs.counted(cell.name, *whole[0])
        rows += _untimed(cell.name, *whole[0])
        rows += _peaks(cell.name, whole)
    return rows


def _outcome(name: str, pair: tuple[Record, Record]) -> ComparisonRow | None:
    old, new = pair
    if _ok(pair):
        before = {check.check for check in failed_checks.failed(old)}
        red = [check.check for check in failed_checks.failed(new) if check.check not in before]
        if not red:
            return None
        reason = f"{', '.join(red)} failed, by the old side not"
        return ComparisonRow(
            FindingKind.PARITY, VerdictKind.FAIL, name, (old.cell_id,), "checks", reason, records=(old.id, new.id)
        )
    was_ok = old.status is Status.OK
    kind = FindingKind.PARITY if was_ok and new.status is Status.NONCONFORMING else FindingKind.OUTCOME
    return ComparisonRow(
        kind, VerdictKind.FAIL if was_ok else VerdictKind.NOT_RUN, name, (old.cell_id,), "outcome",
        new.because if was_ok else f"the old side is {old.status.value}: {old.because}",
        old.status.value, new.status.value, records=(old.id, new.id),
    )  # fmt: skip


def _untimed(name: str, old: Record, new: Record) -> Iterator[ComparisonRow]:
    """Yield a row for each latency that only the old side has."""
    there = times(new)
    for metric, before in times(old).items():
        if metric not in there:
            reason, ids = "is measured by the old side only", (old.id, new.id)
            yield ComparisonRow(
                FindingKind.SPEED,
                VerdictKind.FAIL,
                name,
                (old.cell_id,),
                named(metric),
                reason,
                before,
                None,
                "s",
                records=ids,
            )


def _peaks(name: str, whole: Records) -> list[ComparisonRow]:
    """Compare the training peaks over all process runs of both sides: the counted peaks, if known, and the process peaks.

    Counted peaks are equal in equal process runs, so a difference needs no test. A process peak also includes memory other
    than tensors, e.g. a library's own allocations; on a GPU both are one number.
    """
    allocated = any(m.memory.source == ALLOCATED for pair in whole for r in pair if (m := r.measurements) is not None)
    counted = _sides(whole, COUNTED_PEAK)
    of_process = _sides(whole, PEAK_ABOVE_IMPORTS)
    rows = []
    if counted is not None:
        rows.append(_grown(name, whole, COUNTED_PEAK.quantity, counted, 0 if allocated else COUNTED_PEAK_B, exact=True))
    elif not allocated and (lacking := _lacking(whole)):
        word, ids = VerdictKind.INCONCLUSIVE, (whole[0][0].id, whole[0][1].id)
        rows.append(
            ComparisonRow(
                FindingKind.MEMORY,
                word,
                name,
                (whole[0][0].cell_id,),
                COUNTED_PEAK.quantity,
                lacking,
                unit="B",
                records=ids,
            )
        )
    if of_process is not None and not (allocated and rows):
        rows.append(_grown(name, whole, PEAK, of_process, 0 if allocated else PEAK_B, exact=False))
    return rows


def _sides(whole: Records, metric: Metric) -> tuple[list[Number], list[Number]] | None:
    """Return the value of a metric in all process runs, old and new; None if one of them lacks it."""
    old, new = ([metric.read(pair[side]) for pair in whole] for side in (0, 1))
    there = [n for n in old if n is not None], [n for n in new if n is not None]
    return there if len(there[0]) == len(there[1]) == len(whole) else None


def _lacking(whole: Records) -> str:
    """Describe the process runs of each side without counts, if others have them: that side has probably grown."""
    without = [sum(COUNTED_PEAK.read(pair[side]) is None for pair in whole) for side in (0, 1)]
    told = [f"{n} of {len(whole)} of the {side} side" for n, side in zip(without, ("old", "new"), strict=True) if n]
    # If no run has a count, none was possible: there is no training, or torch has no profiler.
    return "" if sum(without) == 2 * len(whole) else f"not compared: not counted in {' and '.join(told)}"


def _grown(
    name: str, whole: Records, what: str, sides: tuple[list[Number], list[Number]], allowed: int, *, exact: bool
) -> ComparisonRow:
    """Judge by the medians alone if `exact` and the runs of each side differ by `allowed` at most; otherwise also by
    ranks, so that a single disturbed run decides nothing."""
    old, new = sides
    a, b = int(median(old)), int(median(new))
    alike = exact and all(max(side) - min(side) <= allowed for side in sides)
    grew = b - a > allowed and (alike or _higher(new, old))
    shrank = a - b > allowed and (alike or _higher(old, new))
    how = f"counted, so that more than {allowed:,} B is a finding: " if alike else ""
    span = f"old {_span(old)}, new {_span(new)} in {len(whole)} process runs each"
    reason = f"{'grew: ' if grew else 'shrank: ' if shrank else ''}{how}{span}"
    word, ids = VerdictKind.FAIL if grew else VerdictKind.PASS, (whole[0][0].id, whole[0][1].id)
    return ComparisonRow(FindingKind.MEMORY, word, name, (whole[0][0].cell_id,), what, reason, a, b, "B", records=ids)


def _span(values: Sequence[Number]) -> str:
    low, high = min(values), max(values)
    return f"{low:,} B" if low == high else f"{low:,} to {high:,} B"


def _higher(these: Sequence[Number], those: Sequence[Number]) -> bool:
    """Return whether `these` rank higher: one-sided, exact for small samples, at a level that six of each just reach."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(these, those, alternative="greater", method="exact").pvalue) <= _PEAK_LEVEL
