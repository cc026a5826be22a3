"""Compare the benchmarks of a pytest session with saved process runs; no speed without parity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.analysis.comparison.baseline_rows import ComparisonRow, FindingKind, Findings
from harness.analysis.statistics.process_runs import ALARM, MARGIN, Pace, judge
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.bench.pytest_benchmark import Saved
from harness.errors import first_names

_KINDS = {
    Pace.SLOWER: VerdictKind.FAIL,
    Pace.FASTER: VerdictKind.PASS,
    Pace.NOT_SLOWER: VerdictKind.PASS,
    Pace.INCONCLUSIVE: VerdictKind.INCONCLUSIVE,
}
_ALWAYS = ("torch", "gpu")
"""Facts that a run records if it used them; if one is missing, the run did not use it."""


@dataclass(frozen=True)
class Session:
    """Results of a pytest session."""

    place: Mapping[str, str]
    """As in `Saved`."""
    rounds: Mapping[str, Sequence[float]]
    """As in `Saved`, in seconds."""
    absent: Mapping[str, str]
    """Reason why a saved benchmark has no rounds here, by name; only for benchmarks that the session should run."""
    failed: frozenset[str] = frozenset()
    """Names of failed tests."""
    right: int = 0
    """Number of passed cases of @conformance."""
    wrong: int = 0
    """Number of failed cases of @conformance."""


def compare(saved_runs: Sequence[Saved], session: Session, margin: float = MARGIN) -> Findings:
    """Judge each benchmark of the session by the saved runs of the same full name, machine, Python and torch.

    The verdict is FAIL if any is slower or a case of @conformance failed; NOT_RUN if none was compared; INCONCLUSIVE if any
    stays undecided, is missing, or was saved on another machine only; else PASS.
    """
    here = {saved.path: _other_place(saved.place, session.place) for saved in saved_runs}
    names = dict.fromkeys(name for saved in saved_runs for name in saved.rounds)
    rows, away, compared = [], {}, 0
    if session.wrong:
        reason = f"{session.wrong} of {session.wrong + session.right} cases failed: no speed without parity"
        rows.append(ComparisonRow(FindingKind.PARITY, VerdictKind.FAIL, "@conformance", (), "cases", reason))
    for name in names:
        runs = [saved for saved in saved_runs if name in saved.rounds]
        near = [saved.rounds[name] for saved in runs if not here[saved.path]]
        if name in session.failed:
            rows.append(
                ComparisonRow(
                    FindingKind.OUTCOME, VerdictKind.FAIL, name, (), "test", "failed, so that its time is not shown"
                )
            )
        elif name not in session.rounds:
            if name in session.absent:
                rows.append(
                    ComparisonRow(FindingKind.MISSING, VerdictKind.NOT_RUN, name, (), "benchmark", session.absent[name])
                )
        elif not near:
            away[name] = here[runs[-1].path]
        else:
            compared += 1
            row = _row(name, near, session.rounds[name], margin)
            if session.wrong and row.word is VerdictKind.PASS:
                row = replace(row, word=VerdictKind.INCONCLUSIVE, reason=f"no pass without parity: {row.reason}")
            rows.append(row)
    rows += [
        ComparisonRow(FindingKind.NEW, VerdictKind.NOT_RUN, name, (), "benchmark", "is not in the baseline")
        for name in session.rounds
        if name not in names and name not in session.failed
    ]
    rows += _places(away)
    if unused := [saved for saved in saved_runs if here[saved.path]]:
        reason = f"not used, {here[unused[-1].path]}"
        rows.append(
            ComparisonRow(
                FindingKind.ENVIRONMENT,
                VerdictKind.PASS,
                f"{len(unused)} of {len(saved_runs)} saved runs",
                (),
                "machine",
                reason,
            )
        )
    verdict = _verdict(rows, compared, session, margin, next(iter(names), ""))
    return Findings(verdict=verdict, rows=tuple(rows), compared=compared)


def _row(name: str, saved: Sequence[Sequence[float]], new: Sequence[float], margin: float) -> ComparisonRow:
    found = judge(saved, new, margin)
    return ComparisonRow(
        FindingKind.SPEED,
        _KINDS[found.pace],
        name,
        (),
        "median round",
        found.sentence,
        found.base,
        found.new,
        "s",
        found.interval,
    )


def _other_place(saved: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Return the differences between the place of a saved run and this one, of facts that both have.

    For torch and the GPU one side is enough: sessions on a GPU and on a CPU do not compare.
    """
    both = [what for what in saved if what in here or what in _ALWAYS]
    either = both + [what for what in _ALWAYS if what in here and what not in saved]
    differ = [what for what in either if saved.get(what) != here.get(what)]
    return "; ".join(
        f"{what}: {saved.get(what, 'none in use')}, here {here.get(what, 'none in use')}" for what in differ
    )


def _places(away: Mapping[str, str]) -> list[ComparisonRow]:
    found: dict[str, list[str]] = {}
    for name, why in away.items():
        found.setdefault(why, []).append(name)
    return [
        ComparisonRow(
            FindingKind.ENVIRONMENT,
            VerdictKind.INCONCLUSIVE,
            first_names(names),
            (),
            "machine",
            f"saved elsewhere only, {why}",
        )
        for why, names in found.items()
    ]


def _verdict(rows: Sequence[ComparisonRow], compared: int, session: Session, margin: float, example: str) -> Verdict:
    def of(kind: FindingKind, word: VerdictKind) -> list[str]:
        return [row.name for row in rows if row.kind is kind and row.word is word]

    slower, open_, passed = (
        of(FindingKind.SPEED, word) for word in (VerdictKind.FAIL, VerdictKind.INCONCLUSIVE, VerdictKind.PASS)
    )
    red = of(FindingKind.OUTCOME, VerdictKind.FAIL)
    besides = {
        "undecided": [] if session.wrong else open_,
        "missing": of(FindingKind.MISSING, VerdictKind.NOT_RUN),
        "saved on another machine only": of(FindingKind.ENVIRONMENT, VerdictKind.INCONCLUSIVE),
        "test failed": red,
    }
    notes = [f"{what}: {first_names(names)}" for what, names in besides.items() if names]
    rule = f"by more than {100 * margin:g} %, each at a level of {100 * ALARM:g} %"
    if slower:
        first = f"{len(slower)} of {compared} benchmarks slower ({rule}): {first_names(slower)}"
    elif compared:
        first = f"{len(passed)} of {compared} benchmarks not slower ({rule})"
    else:
        first = "nothing was compared"
        if not notes:
            first += f": no benchmark of this session is in the baseline, which has e.g. {example}"
    if session.wrong:
        parity = f"no speed is a pass without parity: {session.wrong} of @conformance failed"
    elif session.right:
        parity = f"@conformance: {session.right} right"
    else:
        parity = "no case of @conformance ran, so correctness is not tested"
    if slower or red or session.wrong:
        word = VerdictKind.FAIL
    else:
        word = VerdictKind.NOT_RUN if not compared else VerdictKind.INCONCLUSIVE if notes else VerdictKind.PASS
    return Verdict(word, "; ".join([first, *notes, parity]))
