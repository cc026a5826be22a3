"""Benchmarks of a pytest session against process runs that were kept of them: no speed without parity, none by silence."""

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
"""What a run says of itself wherever it was in use: without it, it was not."""


@dataclass(frozen=True)
class Session:
    """What a session left.

    place, rounds: as of `Saved`. absent: why a benchmark that was kept may have no rounds here, for those that were asked
    for. failed: names of tests that failed. right, wrong: how many cases of @conformance passed and failed.
    """

    place: Mapping[str, str]
    rounds: Mapping[str, Sequence[float]]
    absent: Mapping[str, str]
    failed: frozenset[str] = frozenset()
    right: int = 0
    wrong: int = 0


def compare(kept: Sequence[Saved], session: Session, margin: float = MARGIN) -> Findings:
    """Judge each benchmark of the session by the kept runs of the same full name, from this machine, Python and torch.

    The verdict is FAIL for any that is slower and where a case of @conformance failed; NOT_RUN where none was compared;
    INCONCLUSIVE where any stays open, is missing, or was kept on another machine only; else PASS.
    """
    here = {saved.path: _elsewhere(saved.place, session.place) for saved in kept}
    names = dict.fromkeys(name for saved in kept for name in saved.rounds)
    rows, away, compared = [], {}, 0
    if session.wrong:
        reason = f"{session.wrong} of {session.wrong + session.right} cases failed: no speed without parity"
        rows.append(ComparisonRow(FindingKind.PARITY, VerdictKind.FAIL, "@conformance", (), "cases", reason))
    for name in names:
        runs = [saved for saved in kept if name in saved.rounds]
        near = [saved.rounds[name] for saved in runs if not here[saved.path]]
        if name in session.failed:
            rows.append(
                ComparisonRow(
                    FindingKind.OUTCOME, VerdictKind.FAIL, name, (), "test", "failed, so that its time is not told"
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
    if unused := [saved for saved in kept if here[saved.path]]:
        reason = f"not used, {here[unused[-1].path]}"
        rows.append(
            ComparisonRow(
                FindingKind.ENVIRONMENT,
                VerdictKind.PASS,
                f"{len(unused)} of {len(kept)} kept runs",
                (),
                "machine",
                reason,
            )
        )
    verdict = _verdict(rows, compared, session, margin, next(iter(names), ""))
    return Findings(verdict=verdict, rows=tuple(rows), compared=compared)


def _row(name: str, kept: Sequence[Sequence[float]], new: Sequence[float], margin: float) -> ComparisonRow:
    found = judge(kept, new, margin)
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


def _elsewhere(kept: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Say in what a run was made elsewhere, of what both sides say; nothing if in none.

    torch and the GPU need one side only: a session on a GPU is not faster than one on a CPU, but another.
    """
    both = [what for what in kept if what in here or what in _ALWAYS]
    either = both + [what for what in _ALWAYS if what in here and what not in kept]
    differ = [what for what in either if kept.get(what) != here.get(what)]
    return "; ".join(
        f"{what}: {kept.get(what, 'none in use')}, here {here.get(what, 'none in use')}" for what in differ
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
            f"kept elsewhere only, {why}",
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
        "left open": [] if session.wrong else open_,
        "missing": of(FindingKind.MISSING, VerdictKind.NOT_RUN),
        "kept on another machine only": of(FindingKind.ENVIRONMENT, VerdictKind.INCONCLUSIVE),
        "whose test failed": red,
    }
    told = [f"{what}: {first_names(names)}" for what, names in besides.items() if names]
    rule = f"by more than {100 * margin:g} %, each at a level of {100 * ALARM:g} %"
    if slower:
        first = f"{len(slower)} of {compared} benchmarks slower ({rule}): {first_names(slower)}"
    elif compared:
        first = f"{len(passed)} of {compared} benchmarks not slower ({rule})"
    else:
        first = "nothing was compared"
        if not told:
            first += f": no benchmark of this session is in the baseline, which has e.g. {example}"
    if session.wrong:
        parity = f"no speed is a pass without parity: {session.wrong} of @conformance failed"
    elif session.right:
        parity = f"@conformance: {session.right} right"
    else:
        parity = "no case of @conformance ran, so nothing here says that they are right"
    if slower or red or session.wrong:
        word = VerdictKind.FAIL
    else:
        word = VerdictKind.NOT_RUN if not compared else VerdictKind.INCONCLUSIVE if told else VerdictKind.PASS
    return Verdict(word, "; ".join([first, *told, parity]))
