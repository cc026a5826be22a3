"""Judge a run against a baseline: each Cell by the kinds of `baseline_rows`, then the run.

"Nothing compared" is never a pass, and every verdict lists the differences of the environments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.analysis import failed_checks
from harness.analysis.comparison import baseline_costs, baseline_losses, baseline_scores, environment_differences
from harness.analysis.comparison.baseline_rows import LOOSER, ComparisonRow, FindingKind, Findings, Margins
from harness.analysis.run_facts import RunFacts
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.errors import Exit, first_names, plural
from harness.records import naming
from harness.records.record import Cell, Outcome, Record, Status

_LAST = (FindingKind.ENVIRONMENT, FindingKind.ASSETS)


@dataclass(frozen=True, kw_only=True)
class Against(Findings):
    """Verdict on a run compared with a baseline."""

    exit: Exit
    """Exit code of the gate."""
    cells: int
    """Number of Cells in the baseline."""
    margins: Margins
    """Margins of the comparison."""
    notes: tuple[str, ...]
    """Further grounds of the verdict."""


def judge(base: RunFacts, new: RunFacts, *, margins: Margins | None = None, strict: bool = False) -> Against:
    """Compare every Cell of the baseline with the run's Record of it.

    Exit codes, the first that holds: NOTHING_COMPARED without one Cell on both sides; FAIL for any failed row or a file that
    was changed after its run; INFRASTRUCTURE for Cells that were not reached or have an unreadable Record, and for a run
    that did not finish; with `strict` INCONCLUSIVE for any row that is so; else PASS.
    """
    margins = margins or Margins()
    # There may be thousands of Cells: map them once.
    expected = [{cell.cell_id: cell for cell in side.run.manifest.cells} for side in (base, new)]
    cells = expected[0] | expected[1]
    names = naming.full(cells.values())
    recipes = {i: cell.recipe_id for i, cell in cells.items()}
    pairs, rows = _matched(base, new, names, expected)
    measured = [(a, b) for a, b in pairs if a.measurements is not None and b.measurements is not None]
    for a, b in pairs:
        rows.append(_standing(names[a.cell_id], a, b))
    for a, b in measured:
        rows += baseline_costs.rows(names[a.cell_id], a, b, margins)
        rows += baseline_losses.rows(names[a.cell_id], a, b)
    rows += baseline_scores.rows(measured, recipes, _called(cells, recipes, names), margins)
    rows += environment_differences.rows(pairs)
    sides = (("baseline", base.run), ("run", new.run))
    unreadable = tuple(f"{side}: {name}: {why}" for side, run in sides for name, why in run.broken.items())
    changed = tuple(f"{side}: {name} {what}" for side, run in sides for name, what in run.changed.items())
    notes: tuple[str, ...] = () if new.how == "finished" else (f"the run is {new.how}",)
    for side, run in sides:
        # Nothing else would reveal an edit. An unfinished run is reported anyway.
        if not (run.footer.sha256 if run.footer else side == "run"):
            what = "has no footer with hashes, so changes of its Records cannot be detected"
            notes += (f"the {side} {what}",)
    verdict, code = _whole(rows, len(pairs), unreadable, changed, notes, strict)
    return Against(
        verdict=verdict, rows=tuple(rows), compared=len(pairs), unreadable=unreadable, changed=changed,
        exit=code, cells=len(base.run.manifest.cells), margins=margins, notes=notes,
    )  # fmt: skip


def _matched(
    base: RunFacts, new: RunFacts, names: Mapping[str, str], expected: Sequence[Mapping[str, Cell]]
) -> tuple[list[tuple[Record, Record]], list[ComparisonRow]]:
    """Pair the Records of each Cell of the baseline; a row for every Cell that has none on one side."""
    before, now = base.latest, new.latest
    known, planned = expected
    torn = {"baseline": _torn(base), "run": _torn(new)}
    doubtful = {"baseline": base.doubtful, "run": new.doubtful}
    pairs: list[tuple[Record, Record]] = []
    rows: list[ComparisonRow] = []
    for i in known:
        a, b = before.get(i), now.get(i)
        odd = [(VerdictKind.FAIL, "the run does not plan this Cell")] if i not in planned else []
        odd += [(VerdictKind.FAIL, f"{side}: {why[i]}") for side, why in doubtful.items() if i in why]
        odd += [(VerdictKind.NOT_RUN, f"{side}: {why[i]}") for side, why in torn.items() if i in why]
        if b is None and not odd:
            odd.append((VerdictKind.NOT_RUN, "the run has no Record of this Cell"))
        elif a is None and not odd:
            odd.append((VerdictKind.NOT_RUN, "the baseline has no Record of this Cell"))
        if odd:
            word, reason = odd[0]
            rows.append(
                ComparisonRow(FindingKind.MISSING, word, names[i], (i,), "Cell", reason, _status(a), _status(b))
            )
        elif a is not None and b is not None:
            pairs.append((a, b))
    for i in planned:
        if i not in known:
            reason = "is not in the baseline"
            rows.append(
                ComparisonRow(
                    FindingKind.NEW, VerdictKind.NOT_RUN, names[i], (i,), "Cell", reason, None, _status(now.get(i))
                )
            )
    return pairs, rows


def _status(record: Record | None) -> str | None:
    return record.status.value if record else None


def _torn(side: RunFacts) -> dict[str, str]:
    """Map the cell_ids of unreadable newest attempts to the file and the reason. An older attempt must not replace one."""
    found = {}
    for name, why in side.run.broken.items():
        cell_id, _, attempt = Path(name).stem.partition(".")
        if attempt.isdecimal() and (cell_id not in side.latest or side.latest[cell_id].attempt < int(attempt)):
            found[cell_id] = f"{name}: {why}"
    return found


def _standing(name: str, base: Record, new: Record) -> ComparisonRow:
    """Judge the outcome of a Cell and its checks: one row."""
    cell, ids, ends = (base.cell_id,), (base.id, new.id), (base.status.value, new.status.value)
    if base.status is not Status.OK:
        word = VerdictKind.PASS if new.status is Status.OK else VerdictKind.INCONCLUSIVE
        reason = f"was {base.status.value} in the baseline"
        return ComparisonRow(FindingKind.OUTCOME, word, name, cell, "status", reason, *ends, records=ids)
    if new.status not in (Status.OK, Status.NONCONFORMING):
        return ComparisonRow(
            FindingKind.OUTCOME, VerdictKind.FAIL, name, cell, "status", new.because, *ends, records=ids
        )
    red = [c.check for c in failed_checks.failed(new)]
    passed, now = ({c.check for c in r.checks if c.outcome is Outcome.PASS} for r in (base, new))
    untried, looser = sorted(passed - now), _looser(base, new)
    if failed_checks.nonconforming(new):
        word, reason = VerdictKind.FAIL, f"{first_names(red)} failed" if red else new.because
    elif untried:
        word, reason = (
            VerdictKind.INCONCLUSIVE,
            f"passed in the baseline, not tried now: {first_names(untried)}",
        )
    elif looser:
        word, reason = VerdictKind.INCONCLUSIVE, f"more is allowed than in the baseline: {first_names(looser)}"
    else:
        word, reason = VerdictKind.PASS, ""
    return ComparisonRow(
        FindingKind.PARITY, word, name, cell, "checks passed", reason, len(passed), len(now), records=ids
    )


def _looser(base: Record, new: Record) -> list[str]:
    """List the checks that allow much more than before, the loosest first, each with the factor."""
    before = {c.check: c.allowed for c in base.checks if c.outcome is Outcome.PASS and c.allowed}
    times = {c.check: c.allowed / before[c.check] for c in new.checks if c.allowed and c.check in before}
    found = sorted((x for x in times.items() if x[1] > LOOSER), key=lambda x: -x[1])
    return [f"{check} ({factor:.3g} times)" for check, factor in found]


def _called(cells: Mapping[str, Cell], recipes: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Name recipes; one with a single Cell has the name of this Cell."""
    of: dict[str, list[str]] = {}
    for cell_id, recipe in recipes.items():
        of.setdefault(recipe, []).append(cell_id)
    several = [cells[i] for ids in of.values() if len(ids) > 1 for i in ids]
    return {recipe: names[ids[0]] for recipe, ids in of.items()} | naming.recipes(several)


def _whole(
    rows: Sequence[ComparisonRow],
    compared: int,
    unreadable: Sequence[str],
    changed: Sequence[str],
    notes: Sequence[str],
    strict: bool,
) -> tuple[Verdict, Exit]:
    judged = [row for row in rows if row.judged]
    ids = tuple(dict.fromkeys(i for row in judged for i in row.records))
    residue = _residue(rows)
    files = [plural(len(unreadable), "unreadable file")] if unreadable else []
    altered = [f"not as their run left them: {', '.join(changed)}"] if changed else []

    def verdict(word: VerdictKind, reasons: Sequence[str]) -> Verdict:
        return Verdict(word, "; ".join([*reasons, *residue]), ids)

    if not compared:
        nothing = "nothing was compared: no Cell has a Record both in the baseline and in the run"
        return verdict(VerdictKind.NOT_RUN, [nothing, *altered, *files, *notes]), Exit.NOTHING_COMPARED
    failed, gone = ([row for row in judged if row.word is word] for word in (VerdictKind.FAIL, VerdictKind.NOT_RUN))
    lacking = [f"not compared: {', '.join(names)}" for names in [_counted(gone)] if names]
    if changed or failed:
        return verdict(VerdictKind.FAIL, [*_counted(failed), *altered, *lacking, *files, *notes]), Exit.FAIL
    cells = f"{plural(compared, 'Cell')} compared, no regression"
    if gone or notes:
        return verdict(VerdictKind.INCONCLUSIVE, [cells, *lacking, *files, *notes]), Exit.INFRASTRUCTURE
    if open_ := [row for row in judged if row.word is VerdictKind.INCONCLUSIVE]:
        left = _counted([row for row in open_ if row.kind not in _LAST])
        reasons = [cells, *([f"left open: {', '.join(left)}"] if left else []), *files]
        return verdict(VerdictKind.INCONCLUSIVE, reasons), Exit.INCONCLUSIVE if strict else Exit.PASS
    return verdict(VerdictKind.PASS, [cells, *files]), Exit.PASS


def _counted(rows: Sequence[ComparisonRow]) -> list[str]:
    """List the kinds of findings, each with its first Cells and the number of others."""
    kinds: dict[FindingKind, list[str]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row.name)
    found = []
    for kind in sorted(kinds, key=list(FindingKind).index):
        names = list(dict.fromkeys(kinds[kind]))
        found.append(f"{kind.value}: {first_names(names)}")
    return found


def _residue(rows: Sequence[ComparisonRow]) -> list[str]:
    """List the differences of the environments, each with its number of Cells."""
    found = [f"{row.reason} ({row.name})" for row in rows if row.kind in _LAST]
    return [f"not the same: {first_names(found)}"] if found else []
