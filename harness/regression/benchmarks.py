"""Compare the benchmarks of a pytest session with saved runs.

If a test case that the decorator `harness.testing.conformance` made fails, the verdict is FAIL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.analysis.comparison.baseline_rows import ComparisonRow, GateResult, RowKind
from harness.analysis.statistics.process_runs import ALARM, MARGIN, Pace, judge
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.bench.pytest_benchmark import Saved
from harness.errors import first_names, plural

_KINDS = {
    Pace.SLOWER: VerdictKind.FAIL,
    Pace.FASTER: VerdictKind.PASS,
    Pace.NOT_SLOWER: VerdictKind.PASS,
    Pace.INCONCLUSIVE: VerdictKind.INCONCLUSIVE,
}
_COMPARED_EVEN_IF_MISSING = ("torch", "gpu")
"""Facts that a session records only if it uses torch or a GPU. A session that has such a fact is not comparable with a
session that lacks it."""


@dataclass(frozen=True)
class SessionResults:
    """Results of a pytest session."""

    place: Mapping[str, str]
    """Facts about the machine, Python and torch, by name. Runs that differ in a fact are not compared."""
    rounds: Mapping[str, Sequence[float]]
    """Full name of a benchmark -> seconds of each round."""
    absent: Mapping[str, str]
    """Full name of a saved benchmark -> reason why this session did not time it. Benchmarks that the session was not
    asked to run are left out."""
    failed: frozenset[str] = frozenset()
    """Full names of the failed tests."""
    cases_passed: int = 0
    """Number of passed test cases that the decorator `harness.testing.conformance` made."""
    cases_failed: int = 0
    """Number of failed test cases that the decorator `harness.testing.conformance` made."""


def compare(saved_runs: Sequence[Saved], session: SessionResults, margin: float = MARGIN) -> GateResult:
    """Compare each benchmark of a session with saved runs, and return the rows and the verdict.

    A benchmark is compared only with saved runs of the same benchmark on the same machine, with the same Python and
    torch. margin: largest slow-down that is not reported, as a fraction of the saved time. The verdict is the first in
    this list whose condition holds:

    - FAIL: a benchmark is slower, its test failed, or a case of @conformance failed.
    - NOT_RUN: no benchmark was compared.
    - INCONCLUSIVE: a benchmark is undecided, is missing, or was saved only on another machine.
    - PASS: otherwise.
    """
    differences = {saved.path: _other_place(saved.place, session.place) for saved in saved_runs}
    names = dict.fromkeys(name for saved in saved_runs for name in saved.rounds)
    rows, compared = [], 0
    elsewhere: dict[str, list[str]] = {}
    if session.cases_failed:
        failed, total = session.cases_failed, session.cases_failed + session.cases_passed
        reason = f"{failed} of {total} cases failed: no speed without parity"
        rows.append(_row(RowKind.PARITY, VerdictKind.FAIL, "@conformance", "cases", reason))
    for name in names:
        runs = [saved for saved in saved_runs if name in saved.rounds]
        here = [saved.rounds[name] for saved in runs if not differences[saved.path]]
        if name in session.failed:
            reason = "failed, so its time is not shown"
            rows.append(_row(RowKind.OUTCOME, VerdictKind.FAIL, name, "test", reason))
        elif name not in session.rounds:
            if name in session.absent:
                reason = session.absent[name]
                rows.append(_row(RowKind.MISSING, VerdictKind.NOT_RUN, name, "benchmark", reason))
        elif not here:
            elsewhere.setdefault(differences[runs[-1].path], []).append(name)
        else:
            compared += 1
            rows.append(_speed(name, here, session, margin))
    new = [name for name in session.rounds if name not in names and name not in session.failed]
    rows += [_row(RowKind.NEW, VerdictKind.NOT_RUN, name, "benchmark", "is not in the baseline") for name in new]
    for why, found in elsewhere.items():
        reason = f"saved on another machine only: {why}"
        rows.append(_row(RowKind.ENVIRONMENT, VerdictKind.INCONCLUSIVE, first_names(found), "machine", reason))
    if unused := [saved for saved in saved_runs if differences[saved.path]]:
        what = f"{len(unused)} of {len(saved_runs)} saved runs"
        reason = f"not used: {differences[unused[-1].path]}"
        rows.append(_row(RowKind.ENVIRONMENT, VerdictKind.PASS, what, "machine", reason))
    verdict = _verdict(rows, compared, session, margin, next(iter(names), ""))
    return GateResult(verdict=verdict, rows=tuple(rows), compared=compared)


def _row(kind: RowKind, word: VerdictKind, name: str, what: str, reason: str) -> ComparisonRow:
    return ComparisonRow(kind, word, name, (), what, reason)


def _speed(name: str, saved: Sequence[Sequence[float]], session: SessionResults, margin: float) -> ComparisonRow:
    found = judge(saved, session.rounds[name], margin)
    word, reason = _KINDS[found.pace], found.sentence
    if session.cases_failed and word is VerdictKind.PASS:
        word, reason = VerdictKind.INCONCLUSIVE, f"no pass without parity: {reason}"
    row = _row(RowKind.SPEED, word, name, "median round", reason)
    return replace(row, base=found.base, new=found.new, unit="s", interval=found.interval)


def _other_place(saved: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Return the differences between the machine of a saved run and this machine, as text; empty if there are none.

    A fact is compared if both machines have it. Torch and the GPU are compared even if only one machine has them, since
    times on a GPU and on a CPU are not comparable.
    """
    none = "none in use"
    facts = [
        fact for fact in {**saved, **here} if fact in _COMPARED_EVEN_IF_MISSING or (fact in saved and fact in here)
    ]
    changed = [fact for fact in facts if saved.get(fact) != here.get(fact)]
    return "; ".join(f"{fact}: {saved.get(fact, none)}, here {here.get(fact, none)}" for fact in changed)


def _verdict(
    rows: Sequence[ComparisonRow], compared: int, session: SessionResults, margin: float, example: str
) -> Verdict:
    def names(kind: RowKind, word: VerdictKind) -> list[str]:
        return [row.name for row in rows if row.kind is kind and row.word is word]

    slower, passed = names(RowKind.SPEED, VerdictKind.FAIL), names(RowKind.SPEED, VerdictKind.PASS)
    failed = names(RowKind.OUTCOME, VerdictKind.FAIL)
    problems = {
        "undecided": [] if session.cases_failed else names(RowKind.SPEED, VerdictKind.INCONCLUSIVE),
        "missing": names(RowKind.MISSING, VerdictKind.NOT_RUN),
        "saved on another machine only": names(RowKind.ENVIRONMENT, VerdictKind.INCONCLUSIVE),
        "test failed": failed,
    }
    notes = [f"{what}: {first_names(found)}" for what, found in problems.items() if found]
    rule = f"by more than {100 * margin:g} %, each at a level of {100 * ALARM:g} %"
    if slower:
        first = f"{len(slower)} of {compared} benchmarks slower ({rule}): {first_names(slower)}"
    elif compared:
        first = f"{len(passed)} of {compared} benchmarks not slower ({rule})"
    elif notes:
        first = "nothing was compared"
    else:
        first = f"nothing was compared: no benchmark of this session is in the baseline, which has e.g. {example}"
    if session.cases_failed:
        parity = f"no benchmark passes without parity: {plural(session.cases_failed, 'case')} of @conformance failed"
    elif session.cases_passed:
        parity = f"@conformance: {plural(session.cases_passed, 'case')} passed"
    else:
        parity = "no case of @conformance ran, so correctness is not tested"
    word = VerdictKind.INCONCLUSIVE if notes else VerdictKind.PASS
    if slower or failed or session.cases_failed:
        word = VerdictKind.FAIL
    elif not compared:
        word = VerdictKind.NOT_RUN
    return Verdict(word, "; ".join([first, *notes, parity]))
