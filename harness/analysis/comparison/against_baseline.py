"""Judge a run against a baseline: first each Cell, then the whole run.

A run without a Cell to compare does not pass. Every verdict lists the differences between the two environments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.analysis import failed_checks
from harness.analysis.comparison import baseline_costs, baseline_scores, environment_differences
from harness.analysis.comparison.baseline_rows import LOOSER, ComparisonRow, GateResult, Margins, RecordPair, RowKind
from harness.analysis.grouping import group
from harness.analysis.run_facts import RunFacts
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.errors import Exit, first_names, plural
from harness.records import naming
from harness.records.record import Cell, Outcome, Record, Status

_DIFFERENCES = (RowKind.ENVIRONMENT, RowKind.ASSETS)
"""Kinds of the rows that show a difference in the environment or in the assets. The verdict names these differences at
its end."""


@dataclass(frozen=True, kw_only=True)
class BaselineVerdict(GateResult):
    """Verdict on a run compared with a baseline."""

    exit: Exit
    """Exit code of `peft-harness gate`."""
    cells: int
    """Number of Cells in the baseline."""
    margins: Margins
    """Largest differences from the baseline that do not fail the gate."""
    notes: tuple[str, ...]
    """Reasons why the comparison is incomplete: the run did not finish, or the run or the baseline has no hashes of its
    files."""


def judge(base: RunFacts, new: RunFacts, *, margins: Margins | None = None, strict: bool = False) -> BaselineVerdict:
    """Compare each Cell of the baseline with its Record in the run. Return the verdict, the exit code and all rows.

    A row compares one quantity. The exit code is the first in this list whose condition holds:

    - NOTHING_COMPARED: no Cell has a Record both in the baseline and in the run.
    - FAIL: a row failed, or a file was changed after its run.
    - INFRASTRUCTURE: a Cell lacks a readable Record in the run or in the baseline, the run did not finish, or the
      baseline or the run has no hashes of its files.
    - INCONCLUSIVE: a row is inconclusive. This code is returned only if `strict` is set.
    - PASS: otherwise.
    """
    margins = margins or Margins()
    cells = {cell.cell_id: cell for side in (base, new) for cell in side.run.manifest.cells}
    names = naming.full(cells.values())
    pairs, rows = _matched(base, new, names)
    rows += map(_conformance, pairs)
    measured = [pair for pair in pairs if pair.base.measurements is not None and pair.new.measurements is not None]
    for pair in measured:
        rows += baseline_costs.rows(pair, margins)
    rows += baseline_scores.rows([(p.base, p.new) for p in measured], _recipe_names(cells, names), margins)
    rows += environment_differences.rows([(p.base, p.new) for p in pairs])
    sides = (("baseline", base.run), ("run", new.run))
    notes: tuple[str, ...] = () if new.run.how == "finished" else (f"the run is {new.run.how}",)
    for side, run in sides:
        # Without hashes, an edit of a Record goes unnoticed. For a new run without a footer, "the run is ..." is enough.
        if not (run.footer.sha256 if run.footer else side == "run"):
            notes += (f"the {side} has no footer with hashes, so changes of its Records cannot be detected",)
    result = BaselineVerdict(
        verdict=Verdict(VerdictKind.NOT_RUN, ""), exit=Exit.NOTHING_COMPARED, rows=tuple(rows), compared=len(pairs),
        unreadable=tuple(f"{side}: {name}: {why}" for side, run in sides for name, why in run.broken.items()),
        changed=tuple(f"{side}: {name} {what}" for side, run in sides for name, what in run.changed.items()),
        cells=len(base.run.manifest.cells), margins=margins, notes=notes,
    )  # fmt: skip
    verdict, code = _whole(result, strict)
    return replace(result, verdict=verdict, exit=code)


def _matched(base: RunFacts, new: RunFacts, names: Mapping[str, str]) -> tuple[list[RecordPair], list[ComparisonRow]]:
    """Pair the Records of each Cell that can be compared. Return the pairs, and a row for every Cell without a pair."""
    expected, planned = ({cell.cell_id for cell in side.run.manifest.cells} for side in (base, new))
    sides = {"baseline": base, "run": new}
    torn = {side: _torn(facts) for side, facts in sides.items()}

    def obstacles(i: str) -> Iterator[tuple[VerdictKind, str]]:
        """Yield the reasons why the Cell with the cell_id `i` cannot be compared, the most serious first."""
        if i not in planned:
            yield VerdictKind.FAIL, "the run does not plan this Cell"
        for side, facts in sides.items():
            if i in facts.doubtful:
                yield VerdictKind.FAIL, f"{side}: {facts.doubtful[i]}"
        for side, unreadable in torn.items():
            if i in unreadable:
                yield VerdictKind.NOT_RUN, f"{side}: {unreadable[i]}"
        for side in ("run", "baseline"):
            if i not in sides[side].latest:
                yield VerdictKind.NOT_RUN, f"the {side} has no Record of this Cell"

    pairs, rows = [], []
    for cell in base.run.manifest.cells:
        i = cell.cell_id
        obstacle = next(obstacles(i), None)
        if obstacle is None:
            pairs.append(RecordPair(names[i], base.latest[i], new.latest[i]))
        else:
            word, reason = obstacle
            statuses = _status(base.latest.get(i)), _status(new.latest.get(i))
            rows.append(ComparisonRow(RowKind.MISSING, word, names[i], (i,), "Cell", reason, *statuses))
    for cell in new.run.manifest.cells:
        if (i := cell.cell_id) not in expected:
            word, reason, status = VerdictKind.NOT_RUN, "is not in the baseline", _status(new.latest.get(i))
            rows.append(ComparisonRow(RowKind.NEW, word, names[i], (i,), "Cell", reason, None, status))
    return pairs, rows


def _status(record: Record | None) -> str | None:
    return record.status.value if record else None


def _torn(side: RunFacts) -> dict[str, str]:
    """Return cell_id -> reason for each Cell whose newest Record is unreadable. The reason names the file.

    Such a Cell is not compared, even if an older Record of the Cell is readable.
    """
    found = {}
    for name, why in side.run.broken.items():
        cell_id, _, attempt = Path(name).stem.partition(".")
        if attempt.isdecimal() and (cell_id not in side.latest or side.latest[cell_id].attempt < int(attempt)):
            found[cell_id] = f"{name}: {why}"
    return found


def _conformance(pair: RecordPair) -> ComparisonRow:
    """Return a row that judges the status and the checks of one Cell."""
    base, new = pair.base, pair.new
    statuses = (base.status.value, new.status.value)
    was = f"was {base.status.value} in the baseline"
    wrong = failed_checks.nonconforming(new)
    if base.status is not Status.OK and not wrong:
        word = VerdictKind.PASS if new.status is Status.OK else VerdictKind.INCONCLUSIVE
        return pair.row(RowKind.OUTCOME, word, "status", was, *statuses)
    if base.status is Status.OK and new.status is not Status.OK and not new.status.departs:
        return pair.row(RowKind.OUTCOME, VerdictKind.FAIL, "status", new.because, *statuses)
    failed = [c.check for c in failed_checks.failed(new)]
    passed, now = ({c.check for c in r.checks if c.outcome is Outcome.PASS} for r in (base, new))
    untried, looser = sorted(passed - now), _looser(base, new)
    word, reason = VerdictKind.PASS, ""
    if wrong:
        word, reason = VerdictKind.FAIL, f"{first_names(failed)} failed" if failed else new.because
        reason += f"; {was}" if base.status is not Status.OK else ""
    elif untried:
        word, reason = VerdictKind.INCONCLUSIVE, f"passed in the baseline, not tried now: {first_names(untried)}"
    elif looser:
        word, reason = VerdictKind.INCONCLUSIVE, f"larger errors allowed than in the baseline: {first_names(looser)}"
    return pair.row(RowKind.PARITY, word, "checks passed", reason, len(passed), len(now))


def _looser(base: Record, new: Record) -> list[str]:
    """List the checks whose allowed error in the run is more than LOOSER times the allowed error in the baseline.

    Each text holds the name of a check and the factor. The largest factor comes first.
    """
    before = {c.check: c.allowed for c in base.checks if c.outcome is Outcome.PASS and c.allowed}
    times = {c.check: c.allowed / before[c.check] for c in new.checks if c.allowed and c.check in before}
    found = sorted((x for x in times.items() if x[1] > LOOSER), key=lambda x: -x[1])
    return [f"{check} ({factor:.3g} times)" for check, factor in found]


def _recipe_names(cells: Mapping[str, Cell], names: Mapping[str, str]) -> dict[str, str]:
    """Return recipe_id -> name of the recipe. A recipe is a set of Cells that differ only in the seed.

    A recipe with a single Cell has the name of this Cell. names: names of the Cells, by cell_id.
    """
    recipes = group((cell.recipe_id, cell) for cell in cells.values())
    several = [cell for same in recipes.values() if len(same) > 1 for cell in same]
    return {recipe: names[same[0].cell_id] for recipe, same in recipes.items()} | naming.recipes(several)


def _whole(result: BaselineVerdict, strict: bool) -> tuple[Verdict, Exit]:
    """Return the verdict on the whole run, and the exit code that `judge` describes."""
    files = [plural(len(result.unreadable), "unreadable file")] if result.unreadable else []
    changed = [f"changed files: {', '.join(result.changed)}"] if result.changed else []
    differences = [f"{row.reason} ({row.name})" for row in result.rows if row.kind in _DIFFERENCES]
    ids = tuple(dict.fromkeys(i for row in result.rows if row.judged for i in row.records))

    def verdict(word: VerdictKind, *reasons: str) -> Verdict:
        last = [f"not the same: {first_names(differences)}"] if differences else []
        return Verdict(word, "; ".join([*reasons, *last]), ids)

    if not result.compared:
        nothing = "nothing was compared: no Cell has a Record both in the baseline and in the run"
        return verdict(VerdictKind.NOT_RUN, nothing, *changed, *files, *result.notes), Exit.NOTHING_COMPARED
    failed, missing = result.of(VerdictKind.FAIL), result.of(VerdictKind.NOT_RUN)
    open_ends = [*([f"not compared: {', '.join(_counted(missing))}"] if missing else []), *files, *result.notes]
    if changed or failed:
        return verdict(VerdictKind.FAIL, *_counted(failed), *changed, *open_ends), Exit.FAIL
    compared = f"{plural(result.compared, 'Cell')} compared, no regression"
    if missing or result.notes:
        return verdict(VerdictKind.INCONCLUSIVE, compared, *open_ends), Exit.INFRASTRUCTURE
    if undecided := result.of(VerdictKind.INCONCLUSIVE):
        kinds = _counted([row for row in undecided if row.kind not in _DIFFERENCES])
        reasons = [compared, *([f"undecided: {', '.join(kinds)}"] if kinds else []), *files]
        return verdict(VerdictKind.INCONCLUSIVE, *reasons), Exit.INCONCLUSIVE if strict else Exit.PASS
    return verdict(VerdictKind.PASS, compared, *files), Exit.PASS


def _counted(rows: Sequence[ComparisonRow]) -> list[str]:
    """Return one text per kind of row: the kind, the names of the first few Cells, and the number of further Cells."""
    kinds = group(dict.fromkeys((row.kind, row.name) for row in rows))
    return [f"{kind.value}: {first_names(kinds[kind])}" for kind in RowKind if kind in kinds]
