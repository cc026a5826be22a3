"""Verdict on an A/B comparison of an old and a new side, i.e. of two revisions or implementations.

Each side runs each Cell in several processes, which form pairs (old, new). Times, memory and outcomes are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from harness.analysis import failed_checks
from harness.analysis.comparison import baseline_costs
from harness.analysis.comparison.baseline_costs import PEAK
from harness.analysis.comparison.baseline_rows import COUNTED_PEAK_B, ComparisonRow, RecordPair, RowKind
from harness.analysis.comparison.environment_differences import CLOCK, clocks_of, throttling
from harness.analysis.comparison.pair_ratio import metric_text, times
from harness.analysis.comparison.reproducibility import CODE_VERSION, PROVIDER, Difference, circumstances
from harness.analysis.contention import busy
from harness.analysis.metrics import COUNTED_PEAK, PEAK_ABOVE_IMPORTS, Metric, Number
from harness.analysis.statistics.canaries import Canaries
from harness.analysis.statistics.paired import NO_FRESH, PairFinding, PairVerdict, family
from harness.analysis.tracked_metrics import STEP
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.errors import Exit
from harness.records.memory import ALLOCATED
from harness.records.record import Record, Status

Records = Sequence[tuple[Record, Record]]
_INTENDED = (CODE_VERSION, PROVIDER)
"""Names of the differences in code, which the comparison is about. The verdict does not report them."""
_SIDES = ("old", "new")
PEAK_B = 2**20
"""Largest growth of the processes' median peak memory on a CPU, in bytes, that does not fail the gate, even if the
growth is statistically significant."""
_PEAK_LEVEL = 0.0011
"""Significance level of the rank test on the peak memory of the processes. The test can just reach this level with six
processes per side."""


@dataclass(frozen=True)
class CellComparison:
    """Comparison of one Cell between the old and the new side."""

    name: str
    """Name of the Cell."""
    records: Records
    """Pairs of Records (old, new), one per pair of processes."""
    timed: Mapping[str, PairVerdict] = field(default_factory=dict)
    """Name of a timed metric -> verdict on it; empty if nothing was timed."""
    because: str = ""
    """Reason why `timed` is empty."""

    def title(self, metric: str) -> str:
        """Return the name of the Cell, followed by the name of the metric unless the metric is the step time."""
        return self.name if metric == STEP else f"{self.name}, {metric_text(metric)}"

    def seconds(self, side: int, metric: str = STEP) -> float | None:
        """Return the time named by `metric` on one side, in seconds: the median over all processes of this side.

        side: 0 for the old side, 1 for the new side. If no process has this time, return None.
        """
        found = [s for pair in self.records if (s := times(pair[side]).get(metric)) is not None]
        return median(found) if found else None


@dataclass(frozen=True)
class JudgedPairs:
    """Verdict on the comparison of the old and the new side."""

    verdict: Verdict
    """Verdict on all Cells together."""
    exit: Exit
    """Exit code of `peft-harness gate --pairs`."""
    cells: tuple[CellComparison, ...]
    """Comparisons of the Cells."""
    adjusted: Mapping[str, float]
    """p value of each time after the Benjamini-Hochberg adjustment. The keys come from `CellComparison.title`."""
    rows: tuple[ComparisonRow, ...]
    """One row per compared quantity other than a time, and one row per latency that only the old side measured."""
    canaries: Canaries
    """Numbers of comparisons of the old side with itself and of false alarms."""
    differences: tuple[str, ...]
    """Unintended differences between the two sides, as texts. If processes waited for a CPU, the last text says how
    many."""


def judge(
    cells: Sequence[CellComparison], canaries: Canaries, *, strict: bool = False, runs_fresh: bool = True
) -> JudgedPairs:
    """Judge all Cells of one A/B comparison.

    The exit code is the first in this list whose condition holds:

    - NOTHING_COMPARED: no Cell could be timed, and none failed.
    - FAIL: on the new side, a Cell is slower, takes more memory or larger files, has other numbers of parameters, lacks
      a latency, or fails although it is ok on the old side.
    - INFRASTRUCTURE: the canaries (comparisons of the old side with itself) had too many false alarms, so no time was
      judged; or a Cell could not be timed.
    - INCONCLUSIVE: a time is undecided, or only some processes of a Cell counted their memory. This code is returned
      only if `strict` is set.
    - PASS: otherwise.

    runs_fresh: False if the second stage, with fresh pairs, is switched off. Then no time can fail.

    Each time (a step or a latency) is judged separately. The level of `Design` is strict enough for a comparison with
    500 such times. The adjusted p values are shown, but decide nothing: with ten or twenty pairs, they would miss
    slow-downs. In simulated gates with 8 Cells, of which one is 3 % slower, 99 % of the gates find this Cell. With
    adjusted p values, 83 % would find it; with 50 Cells, 53 %.
    """
    rows = [row for cell in cells for row in _rows(cell)]
    verdicts = {cell.title(metric): timed for cell in cells for metric, timed in cell.timed.items()}
    slower = [] if canaries.closed else [name for name, timed in verdicts.items() if timed.word is PairFinding.SLOWER]
    undecided = [name for name, timed in verdicts.items() if timed.word is PairFinding.INCONCLUSIVE]
    failed, uncounted = (
        [f"{row.name}: {row.what} {row.reason}" for row in rows if row.word is word]
        for word in (VerdictKind.FAIL, VerdictKind.INCONCLUSIVE)
    )
    timed, untimed = ([c for c in cells if bool(c.timed) is is_timed] for is_timed in (True, False))
    word, code, reason = VerdictKind.PASS, Exit.PASS, f"none of {len(timed)} Cells is slower, larger or worse"
    if not timed and not failed:
        word, code, reason = VerdictKind.NOT_RUN, Exit.NOTHING_COMPARED, "nothing was compared: no Cell could be timed"
    elif slower or failed:
        word, code, reason = (
            VerdictKind.FAIL,
            Exit.FAIL,
            "; ".join([*(f"{name} is slower" for name in slower), *failed]),
        )
    elif canaries.closed:
        word, code, reason = VerdictKind.NOT_RUN, Exit.INFRASTRUCTURE, f"no time was judged: {canaries.sentence}"
    elif untimed:
        word, code = VerdictKind.NOT_RUN, Exit.INFRASTRUCTURE
        reason = f"not timed: {', '.join(f'{c.name} ({c.because})' for c in untimed)}"
    elif undecided or uncounted:
        word, code = VerdictKind.INCONCLUSIVE, Exit.INCONCLUSIVE if strict else Exit.PASS
        what = "Cells" if len(verdicts) == len(timed) else f"times of {len(timed)} Cells"
        count = f"{len(undecided)} of {len(verdicts)} {what} are neither slower nor proven the same"
        count += "" if runs_fresh else f"; {NO_FRESH}"
        reason = "; ".join([*([count] if undecided else []), *uncounted])
    differences = _differences(cells)
    reason = "; ".join([reason, *(f"not the same: {what}" for what in differences)])
    ids = tuple(record.id for cell in cells for pair in cell.records for record in pair)
    verdict = Verdict(word, reason, ids)
    return JudgedPairs(verdict, code, tuple(cells), family(verdicts), tuple(rows), canaries, differences)


def _differences(cells: Sequence[CellComparison]) -> tuple[str, ...]:
    """List the unintended differences between the two sides, and the number of processes that waited for a CPU."""
    pairs = [pair for cell in cells for pair in cell.records]
    counts = Counter(
        difference
        for pair in pairs
        for difference in (*circumstances(*pair), *throttling(*pair))
        if difference.what not in _INTENDED
    )
    found = [f"{difference} ({count} of {len(pairs)} pairs)" for difference, count in counts.items()]
    clocks = [clocks_of([pair[side] for pair in pairs]) or "unknown" for side in (0, 1)]
    if clocks[0] != clocks[1]:
        found.append(str(Difference(CLOCK, *clocks)))
    if waited := sum(bool(busy(record)) for pair in pairs for record in pair):
        found.append(f"{waited} of {2 * len(pairs)} process runs waited for a CPU")
    return tuple(found)


def _ok(pair: tuple[Record, Record]) -> bool:
    return all(record.status is Status.OK for record in pair)


def _rows(cell: CellComparison) -> list[ComparisonRow]:
    rows = [row for pair in cell.records if (row := _outcome(RecordPair(cell.name, *pair)))][:1]
    ok = [pair for pair in cell.records if _ok(pair)]
    if ok:
        first = RecordPair(cell.name, *ok[0])
        rows += baseline_costs.counted(first)
        rows += _untimed(first)
        rows += _peaks(first, ok)
    return rows


def _outcome(pair: RecordPair) -> ComparisonRow | None:
    """Return a row if a Record of the pair is not ok, or if a check failed on the new side but not on the old side.

    Otherwise return None.
    """
    old, new = pair.base, pair.new
    if _ok((old, new)):
        before = {check.check for check in failed_checks.failed(old)}
        failed = [check.check for check in failed_checks.failed(new) if check.check not in before]
        reason = f"{', '.join(failed)} failed on the new side only"
        return pair.row(RowKind.PARITY, VerdictKind.FAIL, "checks", reason) if failed else None
    statuses = old.status.value, new.status.value
    if old.status is not Status.OK:
        reason = f"the old side is {old.status.value}: {old.because}"
        return pair.row(RowKind.OUTCOME, VerdictKind.NOT_RUN, "outcome", reason, *statuses)
    kind = RowKind.PARITY if new.status.departs else RowKind.OUTCOME
    return pair.row(kind, VerdictKind.FAIL, "outcome", new.because, *statuses)


def _untimed(pair: RecordPair) -> Iterator[ComparisonRow]:
    """Yield a row for each latency that only the old side measured."""
    there, reason = times(pair.new), "is measured by the old side only"
    for metric, before in times(pair.base).items():
        if metric not in there:
            yield pair.row(RowKind.SPEED, VerdictKind.FAIL, metric_text(metric), reason, before, None, "s")


def _peaks(first: RecordPair, whole: Records) -> Iterator[ComparisonRow]:
    """Yield up to two rows that compare the peak memory of training over all processes.

    One row compares the counted peak: the bytes of all tensors that exist at one time. Equal programs have equal
    counted peaks, so a difference needs no test. The other row compares the peak of the process, which also includes
    memory other than tensors, e.g. a library's own allocations. On a GPU, both peaks are the same number, so there is
    only one row. first: the pair of Records that the rows name.
    """
    allocated = any(m.memory.source == ALLOCATED for pair in whole for r in pair if (m := r.measurements) is not None)
    counted, of_process = _sides(whole, COUNTED_PEAK), _sides(whole, PEAK_ABOVE_IMPORTS)
    if counted is not None:
        yield _grown(first, COUNTED_PEAK.quantity, counted, 0 if allocated else COUNTED_PEAK_B, exact=True)
    elif not allocated and (reason := _uncounted(whole)):
        yield first.row(RowKind.MEMORY, VerdictKind.INCONCLUSIVE, COUNTED_PEAK.quantity, reason, unit="B")
    if of_process is not None and not (allocated and counted is not None):
        yield _grown(first, PEAK, of_process, 0 if allocated else PEAK_B, exact=False)


def _sides(whole: Records, metric: Metric) -> tuple[list[Number], list[Number]] | None:
    """Return the values of a metric on the old side and on the new side, one value per process.

    If the metric is missing in any process, return None.
    """
    old, new = ([metric.read(pair[side]) for pair in whole] for side in (0, 1))
    there = [n for n in old if n is not None], [n for n in new if n is not None]
    return there if len(there[0]) == len(there[1]) == len(whole) else None


def _uncounted(whole: Records) -> str:
    """Return a text that says, for each side, how many processes have no counted peak of tensor memory.

    If no process has a counted peak, return an empty string. A step that needs too much memory is not counted. So if
    only one side lacks counts, its memory has probably grown.
    """
    without = [sum(COUNTED_PEAK.read(pair[side]) is None for pair in whole) for side in (0, 1)]
    parts = [f"{n} of {len(whole)} runs of the {side} side" for n, side in zip(without, _SIDES, strict=True) if n]
    # If all runs lack the count, it was impossible: there is no training, or torch has no profiler.
    return "" if sum(without) == 2 * len(whole) else f"not compared: not counted in {' and '.join(parts)}"


def _grown(
    first: RecordPair, what: str, sides: tuple[list[Number], list[Number]], allowed: int, *, exact: bool
) -> ComparisonRow:
    """Return a row that compares one kind of memory peak between the old and the new side, over all processes.

    The row fails if the median grew by more than `allowed` and a rank test confirms the growth. So a single disturbed
    process decides nothing. No test is needed if `exact` is set and the processes of each side differ from each other
    by at most `allowed`.
    """
    old, new = sides
    a, b = int(median(old)), int(median(new))
    alike = exact and all(max(side) - min(side) <= allowed for side in sides)
    grew = b - a > allowed and (alike or _higher(new, old))
    shrank = a - b > allowed and (alike or _higher(old, new))
    change = "grew: " if grew else "shrank: " if shrank else ""
    rule = f"counted, so growth by more than {allowed:,} B is a finding: " if alike else ""
    reason = f"{change}{rule}old {_span(old)}, new {_span(new)} in {len(old)} process runs each"
    word = VerdictKind.FAIL if grew else VerdictKind.PASS
    return first.row(RowKind.MEMORY, word, what, reason, a, b, "B")


def _span(values: Sequence[Number]) -> str:
    low, high = min(values), max(values)
    return f"{low:,} B" if low == high else f"{low:,} to {high:,} B"


def _higher(left: Sequence[Number], right: Sequence[Number]) -> bool:
    """Return whether the values of `left` are significantly above the values of `right`, by an exact rank test."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(left, right, alternative="greater", method="exact").pvalue) <= _PEAK_LEVEL
