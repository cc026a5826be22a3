"""Judge a run: each question of its suite (a declared comparison of Cells), and the run as a whole."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from harness.analysis import failed_checks as parity
from harness.analysis import trajectories
from harness.analysis.ranking import Score, accuracies, score, why_not_comparable
from harness.analysis.statistics import over_seeds
from harness.analysis.trajectories import JudgedTrajectory
from harness.analysis.verdict_kind import Verdict, VerdictKind, joint
from harness.errors import Exit, first_names, plural
from harness.records import naming
from harness.records.manifest import Comparison
from harness.records.record import Cell, CheckResult, Outcome, Record, Status
from harness.records.store import Run

_SHOWN = 4
"""Largest number of reasons that a verdict `not-run` lists. A suite with a matrix may have hundreds of reasons."""
UNMEASURED = (Status.OOM, Status.TIMEOUT, Status.ERROR, Status.LOST)


@dataclass(frozen=True)
class QuestionVerdict:
    """Verdict on one question of the suite."""

    comparison: Comparison
    """The comparison, as the suite declares it."""
    verdict: Verdict
    trajectories: tuple[JudgedTrajectory, ...] | None = None
    """Verdict on each Cell of a `same-losses` comparison. None for any other kind of comparison."""


@dataclass(frozen=True)
class Parity:
    """Numbers of passed, failed and skipped checks over all Cells. Checks of servers are left out."""

    passed: int
    failed: int
    skipped: int
    unchecked: tuple[str, ...]
    """Ids of ok Records in which no check passed."""
    shared: int
    """Number of Cells that reuse the parity gate (the checks before training) of another Cell. Reused checks count
    once."""


@dataclass(frozen=True)
class RunVerdict:
    """Verdict on a run."""

    verdict: Verdict
    """Verdict on the run as a whole."""
    exit: Exit
    """Exit code of the run if the option `--strict` is not set."""
    counts: dict[str, int]
    """Number of Cells per status. Cells without a usable Record count as `missing`, `changed` or `ungated`."""
    nonconforming: tuple[str, ...]
    """Ids of Records whose status is `nonconforming` or `untrained`, or that failed a check, e.g. a check of a
    server."""
    missing: tuple[str, ...]
    """cell_ids of the Cells without a Record."""
    judgements: tuple[QuestionVerdict, ...]
    """Verdicts on the questions of the suite."""
    parity: Parity
    """Numbers of passed, failed and skipped checks."""

    def exit_code(self, *, strict: bool) -> Exit:
        """Return the exit code. If `strict` is set and a question is open, return INCONCLUSIVE instead of PASS."""
        left_open = self.exit is Exit.PASS and self.verdict.word is VerdictKind.INCONCLUSIVE
        return Exit.INCONCLUSIVE if strict and left_open else self.exit


def judge(run: Run) -> RunVerdict:
    """Judge every comparison that the suite of a run declares, then the run as a whole.

    The exit code is the first in this list whose condition holds:

    - FAIL: a Cell departs from its Method, a server gave wrong answers or none, the training of a Cell diverged or left
      a tensor unchanged, a comparison is refuted, or a file was changed after the run. Missing Cells do not matter.
    - NOTHING_COMPARED: no Cell was measured, and none failed: each Cell was skipped or is missing.
    - INFRASTRUCTURE: a Cell failed or is missing, the checks that it reuses from another Cell are lost, a file is
      unreadable, or the run is unfinished.
    - PASS: otherwise, even if questions are open (see `exit_code`).
    """
    latest = run.latest()
    missing = tuple(run.missing())
    judgements = tuple(_judge_comparison(c, run, latest) for c in run.manifest.comparisons)
    counts = Counter(record.status.value for record in latest.values())
    if missing:
        counts["missing"] = len(missing)
    if ungated := run.ungated_cells():
        counts["ungated"] = len(ungated)
    if changed := run.doubtful().keys() - ungated:
        counts["changed"] = len(changed)
    nonconforming = tuple(r.id for r in latest.values() if parity.nonconforming(r))
    verdict, code = _whole(run, latest, judgements, nonconforming)
    return RunVerdict(verdict, code, dict(counts), nonconforming, missing, judgements, _parity(latest))


def _parity(latest: dict[str, Record]) -> Parity:
    found = [
        check for record in latest.values() for check in parity.checks_run_here(record) if not parity.of_serving(check)
    ]
    # A gate counts once, also if the Record that took it is no longer the newest of its Cell.
    newest = {record.id for record in latest.values()}
    older = dict[str, list[CheckResult]]()
    for record in latest.values():
        if record.gate and record.gate.record and record.gate.record not in newest:
            reused = record.checks[: record.gate.checks]  # some Records reuse the check of merged weights, too
            older[record.gate.record] = max(older.get(record.gate.record, []), reused, key=len)
    found += [check for results in older.values() for check in results]
    outcomes = Counter(check.outcome for check in found)
    unchecked = tuple(
        r.id for r in latest.values() if r.status is Status.OK and not any(c.outcome is Outcome.PASS for c in r.checks)
    )
    shared = sum(bool(record.gate and record.gate.record) for record in latest.values())
    return Parity(outcomes[Outcome.PASS], outcomes[Outcome.FAIL], outcomes[Outcome.SKIPPED], unchecked, shared)


def _judge_comparison(comparison: Comparison, run: Run, latest: dict[str, Record]) -> QuestionVerdict:
    cells = {cell.cell_id: cell for cell in run.manifest.cells}
    unknown = [i for i in (*comparison.left, *comparison.right) if i not in cells]
    if unknown:
        reason = f"{plural(len(unknown), 'Cell')} of this question not in this run, e.g. because of --only: "
        return QuestionVerdict(comparison, Verdict(VerdictKind.NOT_RUN, reason + ", ".join(unknown)))
    if comparison.kind == "same-losses":
        return QuestionVerdict(comparison, *trajectories.judge(comparison, cells, latest))
    return QuestionVerdict(comparison, _better(comparison, cells, latest))


@dataclass(frozen=True, order=True)
class _PairOutcome:
    """Verdict on one pair of recipes."""

    gap: float
    """Lower end of the interval of the difference left - right. The verdict on the question quotes the pair with the
    smallest gap."""
    sentence: str
    kind: VerdictKind = field(compare=False)


def _better(comparison: Comparison, cells: Mapping[str, Cell], latest: Mapping[str, Record]) -> Verdict:
    sides = [_recipes(ids, cells) for ids in (comparison.left, comparison.right)]
    names = naming.full(cells.values()) | naming.recipes(cells.values())
    pairs = list(itertools.product(*sides))
    outcomes = [outcome for left, right in pairs for outcome in _compare(left, right, latest, names)]
    ids = tuple(latest[i].id for i in dict.fromkeys(comparison.left + comparison.right) if i in latest)
    if not outcomes:
        return Verdict(VerdictKind.NOT_RUN, "the question names no Cells", ids)
    kind = joint(o.kind for o in outcomes)
    sentences = list(dict.fromkeys(o.sentence for o in sorted(outcomes) if o.kind is kind))
    if kind is VerdictKind.NOT_RUN:
        more = [f"and {len(sentences) - _SHOWN} more"] if len(sentences) > _SHOWN else []
        return Verdict(kind, f"not judged: {'; '.join(sentences[:_SHOWN] + more)}", ids)
    several = any(len(seeds) > 1 for side in sides for seeds in side)
    text = {
        VerdictKind.FAIL: "the opposite holds",
        VerdictKind.INCONCLUSIVE: "the interval of the difference contains 0" if several else "the intervals overlap",
        VerdictKind.PASS: "the interval of the difference lies above 0" if several else "the intervals do not overlap",
    }[kind]
    # The worst pair represents the others.
    count = "the closest of" if kind is VerdictKind.PASS else f"so in {len(sentences)} of"
    others = f" ({count} {len(pairs)} pairs)" if len(pairs) > 1 else ""
    return Verdict(kind, f"{text}: {sentences[0]}{others}", ids)


def _recipes(ids: list[str], cells: Mapping[str, Cell]) -> list[list[Cell]]:
    """Group the Cells that differ only in the seed. Return one list of Cells per group, in the order of the seeds."""
    found: dict[str, list[Cell]] = {cells[i].recipe_id: [] for i in ids}
    for cell in sorted((cells[i] for i in ids), key=lambda cell: cell.seed):
        found[cell.recipe_id].append(cell)
    return list(found.values())


def _compare(
    left: list[Cell], right: list[Cell], latest: Mapping[str, Record], names: Mapping[str, str]
) -> list[_PairOutcome]:
    """Judge one pair of recipes and return its outcome.

    If the pair cannot be judged, return one outcome for each reason. With several seeds, the interval of the difference
    decides. With one run of each recipe, the intervals of both accuracies decide: if they overlap, the pair is
    inconclusive.
    """

    def not_run(*sentences: str) -> list[_PairOutcome]:
        return [_PairOutcome(0.0, sentence, VerdictKind.NOT_RUN) for sentence in sentences]

    a_name, b_name = (names[side[0].cell_id if len(side) == 1 else side[0].recipe_id] for side in (left, right))
    if refusal := why_not_comparable(left[0], right[0]):
        return not_run(f"{a_name} and {b_name} are not comparable: {refusal}")
    ids = [cell.cell_id for cell in (*left, *right)]
    if missing := [f"{names[i]} {why}" for i in ids if (why := _why_no_accuracy(latest.get(i)))]:
        return not_run(*missing)
    a_runs, b_runs = ([latest[cell.cell_id] for cell in side] for side in (left, right))
    a, b = score(a_runs), score(b_runs)
    sentence = f"{a_name} {_interval(a)} against {b_name} {_interval(b)}"
    low, high = a.low - b.high, a.high - b.low
    if not len(left) == len(right) == 1:
        seeds = [[cell.seed for cell in side] for side in (left, right)]
        if seeds[0] != seeds[1]:
            return not_run(f"{sentence}: their seeds are not the same, {seeds[0]} against {seeds[1]}")
        found = over_seeds.difference(accuracies(a_runs), accuracies(b_runs))
        if found is None:
            return not_run(f"{sentence}: they were not scored on the same items")
        low, high = found.interval
        difference = f"{100 * found.value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        sentence = f"{sentence}: {difference} over {len(left)} seeds"
    kind = VerdictKind.PASS if low > 0 else VerdictKind.FAIL if high < 0 else VerdictKind.INCONCLUSIVE
    return [_PairOutcome(low, sentence, kind)]


def _why_no_accuracy(record: Record | None) -> str:
    if record is None:
        return "is missing"
    if record.measurements is None:
        return f"is {record.status.value}: {record.because}"
    return "" if record.accuracy else "was not scored"


def _interval(a: Score) -> str:
    return f"{100 * a.value:.1f} % [{100 * a.low:.1f}, {100 * a.high:.1f}]"


def _whole(
    run: Run, latest: dict[str, Record], judgements: tuple[QuestionVerdict, ...], nonconforming: tuple[str, ...]
) -> tuple[Verdict, Exit]:
    def verdict(kind: VerdictKind, ids: Iterable[str], *reasons: str) -> Verdict:
        return Verdict(kind, "; ".join(filter(None, reasons)), tuple(dict.fromkeys(ids)))

    refuted = [j for j in judgements if j.verdict.word is VerdictKind.FAIL]
    if nonconforming or refuted or run.changed:
        names = naming.full(run.manifest.cells)
        departed = [r for r in latest.values() if r.id in nonconforming]
        diverged = [names[r.cell_id] for r in departed if parity.diverged(r)]
        servers = [_failed_checks(names[r.cell_id], r) for r in departed if parity.only_of_serving(r)]
        untrained = [f"{names[r.cell_id]}: {r.because}" for r in departed if r.status is Status.UNTRAINED]
        others = [
            _failed_checks(names[r.cell_id], r)
            for r in departed
            if not parity.diverged(r) and not parity.only_of_serving(r) and r.status is not Status.UNTRAINED
        ]
        return verdict(
            VerdictKind.FAIL,
            (*nonconforming, *(i for j in refuted for i in j.verdict.records)),
            f"changed after the run: {', '.join(run.changed)}" if run.changed else "",
            f"{plural(len(others), 'Cell')} departing from the Method ({'; '.join(others)})" if others else "",
            f"training of {plural(len(untrained), 'Cell')} left a tensor as it was ({'; '.join(untrained)})"
            if untrained
            else "",
            f"training of {plural(len(diverged), 'Cell')} diverged ({'; '.join(diverged)})" if diverged else "",
            f"the servers of {plural(len(servers), 'Cell')} gave wrong answers or none ({'; '.join(servers)})"
            if servers
            else "",
            *(f"refuted: “{j.comparison.says}”" for j in refuted),
        ), Exit.FAIL

    ok = [r for r in latest.values() if r.status is Status.OK]
    # The machine is at fault if it prevented a Cell from running, but not if the Cell cannot run on it.
    bad = [r for r in latest.values() if r.status in UNMEASURED or (r.status is Status.SKIPPED and r.failure)]
    if not ok and not bad:
        ids = [r.id for r in latest.values()]
        return verdict(VerdictKind.NOT_RUN, ids, "no Cell was measured"), Exit.NOTHING_COMPARED

    missing = len(run.missing())
    ungated = len(run.ungated_cells())
    if bad or missing or ungated or run.broken or run.how != "finished":
        return verdict(
            VerdictKind.INCONCLUSIVE,
            [r.id for r in bad],
            f"{plural(len(bad), 'Cell')} not measured ({_statuses(bad)})" if bad else "",
            f"{plural(missing, 'Cell')} without any Record" if missing else "",
            f"{plural(ungated, 'Cell')} whose parity gate is lost" if ungated else "",
            plural(len(run.broken), "unreadable file") if run.broken else "",
            f"the run is {run.how}" if run.how != "finished" else "",
        ), Exit.INFRASTRUCTURE

    undecided = [j for j in judgements if j.verdict.word is not VerdictKind.PASS]
    if undecided:
        of_suite = (
            f"{len(undecided)} of {len(judgements)} questions" if len(judgements) > 1 else "the suite's question is"
        )
        ids = [i for j in undecided for i in j.verdict.records]
        return verdict(VerdictKind.INCONCLUSIVE, ids, f"{of_suite} left open", _conform(ok)), Exit.PASS
    questions = (
        f"all {len(judgements)} questions of the suite are" if len(judgements) > 1 else "the suite's question is"
    )
    answered = f" and {questions} answered yes" if judgements else ""
    return verdict(VerdictKind.PASS, [r.id for r in ok], f"{_conform(ok)}{answered}"), Exit.PASS


def _conform(ok: list[Record]) -> str:
    """Return a sentence that says that all measured Cells conform, and how many of them had no reference."""
    unreferenced = sum(bool(parity.unreferenced(r)) for r in ok)
    of_them = f"{unreferenced} of them " if len(ok) > 1 else ""
    exception = f", {of_them}without a reference to compare with" if unreferenced else ""
    conform = f"all {len(ok)} measured Cells conform" if len(ok) > 1 else "the only measured Cell conforms"
    return f"{conform}{exception}"


def _failed_checks(name: str, record: Record) -> str:
    failed = [c.check for c in parity.failed(record)]
    why = f"{first_names(failed, 2)} failed" if failed else record.because
    return f"{name}: {why}" if why else name


def _statuses(records: list[Record]) -> str:
    return ", ".join(f"{n} {status}" for status, n in Counter(r.status.value for r in records).items())
