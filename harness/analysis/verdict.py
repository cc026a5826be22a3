"""Judge a run: each question of its suite, and the run as a whole."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from harness.analysis import failed_checks as parity
from harness.analysis import trajectories
from harness.analysis.ranking import Score, accuracies, score, why_not_comparable
from harness.analysis.statistics import over_seeds
from harness.analysis.verdict_kind import Verdict, VerdictKind, joint
from harness.errors import Exit, first_names, plural
from harness.records import naming
from harness.records.manifest import Comparison
from harness.records.record import Cell, Outcome, Record, Status
from harness.records.store import Run

_SHOWN = 4
"""Most reasons for a missing verdict in one sentence; a matrix may have hundreds."""
UNMEASURED = (Status.OOM, Status.TIMEOUT, Status.ERROR, Status.LOST)


@dataclass(frozen=True)
class QuestionVerdict:
    """Verdict on one question of the suite."""

    comparison: Comparison
    """The question."""
    verdict: Verdict
    losses: trajectories.SameLosses | None = None
    """Details of a `same-losses` comparison; None for another kind."""


@dataclass(frozen=True)
class Parity:
    """Counts of the checks of all Cells."""

    passed: int
    failed: int
    skipped: int
    unchecked: tuple[str, ...]
    """Ids of ok Records without a passed check."""


@dataclass(frozen=True)
class RunVerdict:
    """Verdict on a run."""

    verdict: Verdict
    """Verdict on the run as a whole."""
    exit: Exit
    """Exit code without `--strict`."""
    counts: dict[str, int]
    """Number of Cells per status, `missing` and `changed` included."""
    nonconforming: tuple[str, ...]
    """Ids of Records that depart from their Method or diverged."""
    missing: tuple[str, ...]
    """cell_ids without a Record."""
    how: str
    """End of the run: `finished`, `interrupted`, `failed`, or `incomplete` without a footer."""
    judgements: tuple[QuestionVerdict, ...]
    """Verdicts on the questions of the suite."""
    parity: Parity
    """Counts of the checks."""

    def exit_code(self, *, strict: bool) -> Exit:
        """Return the exit code; with `strict`, INCONCLUSIVE instead of PASS if a question is open."""
        left_open = self.exit is Exit.PASS and self.verdict.word is VerdictKind.INCONCLUSIVE
        return Exit.INCONCLUSIVE if strict and left_open else self.exit


def judge(run: Run) -> RunVerdict:
    """Judge every comparison of a run, then the run.

    Exit codes, the first that holds: FAIL for a nonconforming Cell, a refuted comparison or a file that was changed after
    the run, since no missing Cell can undo such a finding; NOTHING_COMPARED if no Cell was measured; INFRASTRUCTURE if some
    Cells were not measured; otherwise PASS, also with open questions (see `exit_code`).
    """
    latest = run.latest()
    missing = tuple(run.missing())
    judgements = tuple(_judge_comparison(c, run, latest) for c in run.manifest.comparisons)
    counts = Counter(record.status.value for record in latest.values())
    if missing:
        counts["missing"] = len(missing)
    if doubtful := run.doubtful():
        counts["changed"] = len(doubtful)
    nonconforming = tuple(r.id for r in latest.values() if parity.nonconforming(r))
    how = run.footer.how if run.footer else "incomplete"
    verdict, code = _whole(run, latest, judgements, nonconforming, how)
    return RunVerdict(verdict, code, dict(counts), nonconforming, missing, how, judgements, _parity(latest))


def _parity(latest: dict[str, Record]) -> Parity:
    outcomes = Counter(check.outcome for record in latest.values() for check in record.checks)
    unchecked = tuple(
        r.id for r in latest.values() if r.status is Status.OK and not any(c.outcome is Outcome.PASS for c in r.checks)
    )
    return Parity(outcomes[Outcome.PASS], outcomes[Outcome.FAIL], outcomes[Outcome.SKIPPED], unchecked)


def _judge_comparison(comparison: Comparison, run: Run, latest: dict[str, Record]) -> QuestionVerdict:
    cells = {cell.cell_id: cell for cell in run.manifest.cells}
    unknown = [i for i in (*comparison.left, *comparison.right) if i not in cells]
    if unknown:
        reason = f"{plural(len(unknown), 'Cell')} of this question not in this run, e.g. because of --only: "
        return QuestionVerdict(comparison, Verdict(VerdictKind.NOT_RUN, reason + ", ".join(unknown)))
    if comparison.kind == "same-losses":
        losses = trajectories.judge(comparison, cells, latest)
        return QuestionVerdict(comparison, losses.verdict, losses)
    return QuestionVerdict(comparison, _better(comparison, cells, latest))


@dataclass(frozen=True, order=True)
class _PairOutcome:
    """Verdict on one pair of recipes."""

    gap: float
    """Lower end of the difference; the pair with the lowest one speaks most against the question."""
    sentence: str
    kind: VerdictKind = field(compare=False)


def _better(comparison: Comparison, cells: Mapping[str, Cell], latest: Mapping[str, Record]) -> Verdict:
    sides = [_recipes(ids, cells) for ids in (comparison.left, comparison.right)]
    names = naming.full(cells.values()) | naming.recipes(cells.values())
    pairs = list(itertools.product(*sides))
    outcomes = [o for left, right in pairs for o in _compare(left, right, cells, latest, names)]
    ids = tuple(latest[i].id for i in dict.fromkeys(comparison.left + comparison.right) if i in latest)
    if not outcomes:
        return Verdict(VerdictKind.NOT_RUN, "it names no Cells", ids)
    kind = joint(o.kind for o in outcomes)
    sentences = list(dict.fromkeys(o.sentence for o in sorted(outcomes) if o.kind is kind))
    if kind is VerdictKind.NOT_RUN:
        more = [f"and {len(sentences) - _SHOWN} more"] if len(sentences) > _SHOWN else []
        return Verdict(kind, f"not judged: {'; '.join(sentences[:_SHOWN] + more)}", ids)
    several = any(len(seeds) > 1 for side in sides for seeds in side)
    text = {
        VerdictKind.FAIL: "the opposite holds",
        VerdictKind.INCONCLUSIVE: "the interval of the difference contains 0" if several else "the intervals overlap",
        VerdictKind.PASS: "the interval of the difference lies above 0" if several else "the intervals lie apart",
    }[kind]
    more_pairs = ""
    if len(pairs) > 1:
        count = "the closest of" if kind is VerdictKind.PASS else f"so in {len(sentences)} of"
        more_pairs = f" ({count} {len(pairs)} pairs)"
    return Verdict(kind, f"{text}: {sentences[0]}{more_pairs}", ids)  # the worst pair represents the others


def _recipes(ids: list[str], cells: Mapping[str, Cell]) -> list[list[str]]:
    """Group the Cells that differ in the seed alone, in the order of their seeds."""
    found: dict[str, list[str]] = {}
    for cell_id in sorted(ids, key=lambda i: cells[i].seed):
        found.setdefault(cells[cell_id].recipe_id, []).append(cell_id)
    order = list(dict.fromkeys(cells[i].recipe_id for i in ids))
    return [found[recipe] for recipe in order]


def _compare(
    left: list[str], right: list[str], cells: Mapping[str, Cell], latest: Mapping[str, Record], names: Mapping[str, str]
) -> Iterator[_PairOutcome]:
    """Judge one pair of recipes, or yield every reason against a verdict.

    With several seeds, the interval of the difference decides; with one run of each, the two intervals of the accuracies.
    """

    def not_run(sentence: str) -> _PairOutcome:
        return _PairOutcome(0.0, sentence, VerdictKind.NOT_RUN)

    a_name, b_name = (names[side[0] if len(side) == 1 else cells[side[0]].recipe_id] for side in (left, right))
    if refusal := why_not_comparable(cells[left[0]], cells[right[0]]):
        yield not_run(f"{a_name} and {b_name} are not comparable: {refusal}")
        return
    missing = [f"{names[i]} {why}" for i in (*left, *right) if (why := _why_no_accuracy(latest.get(i)))]
    if missing:
        yield from map(not_run, missing)
        return
    a_runs, b_runs = ([latest[i] for i in side] for side in (left, right))
    a, b = score(a_runs), score(b_runs)
    sentence = f"{a_name} {_interval(a)} against {b_name} {_interval(b)}"
    low, high = a.low - b.high, a.high - b.low
    if not len(left) == len(right) == 1:
        seeds = [[record.cell.seed for record in side] for side in (a_runs, b_runs)]
        if seeds[0] != seeds[1]:
            yield not_run(f"{sentence}: their seeds are not the same, {seeds[0]} against {seeds[1]}")
            return
        found = over_seeds.difference(accuracies(a_runs), accuracies(b_runs))
        if found is None:
            yield not_run(f"{sentence}: they were not scored on the same items")
            return
        low, high = found.interval
        difference = f"{100 * found.value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        sentence = f"{sentence}: {difference} over {len(left)} seeds"
    kind = VerdictKind.PASS if low > 0 else VerdictKind.FAIL if high < 0 else VerdictKind.INCONCLUSIVE
    yield _PairOutcome(low, sentence, kind)


def _why_no_accuracy(record: Record | None) -> str:
    if record is None:
        return "is missing"
    if record.measurements is None:
        return f"is {record.status.value}: {record.because}"
    return "" if record.measurements.accuracy else "was not scored"


def _interval(a: Score) -> str:
    return f"{100 * a.value:.1f} % [{100 * a.low:.1f}, {100 * a.high:.1f}]"


def _whole(
    run: Run,
    latest: dict[str, Record],
    judgements: tuple[QuestionVerdict, ...],
    nonconforming: tuple[str, ...],
    how: str,
) -> tuple[Verdict, Exit]:
    def verdict(kind: VerdictKind, ids: Iterable[str], *reasons: str) -> Verdict:
        return Verdict(kind, "; ".join(filter(None, reasons)), tuple(dict.fromkeys(ids)))

    refuted = [j for j in judgements if j.verdict.word is VerdictKind.FAIL]
    if nonconforming or refuted or run.changed:
        names = naming.full(run.manifest.cells)
        departed = [r for r in latest.values() if r.id in nonconforming]
        diverged = [names[r.cell_id] for r in departed if parity.diverged(r)]
        others = [_failed_checks(names[r.cell_id], r) for r in departed if not parity.diverged(r)]
        return verdict(
            VerdictKind.FAIL,
            (*nonconforming, *(i for j in refuted for i in j.verdict.records)),
            f"changed after the run: {', '.join(run.changed)}" if run.changed else "",
            f"{plural(len(others), 'Cell')} not computing what the Method says ({'; '.join(others)})" if others else "",
            f"training of {plural(len(diverged), 'Cell')} diverged ({'; '.join(diverged)})" if diverged else "",
            *(f"refuted: “{j.comparison.says}”" for j in refuted),
        ), Exit.FAIL

    ok = [r for r in latest.values() if r.status is Status.OK]
    # A Cell that was prevented from running is a fault of the machine; a Cell that cannot run here is not.
    bad = [r for r in latest.values() if r.status in UNMEASURED or (r.status is Status.SKIPPED and r.failure)]
    if not ok and not bad:
        ids = [r.id for r in latest.values()]
        return verdict(VerdictKind.NOT_RUN, ids, "no Cell was measured"), Exit.NOTHING_COMPARED

    missing = len(run.missing())
    if bad or missing or run.broken or how != "finished":
        return verdict(
            VerdictKind.INCONCLUSIVE,
            [r.id for r in bad],
            f"{plural(len(bad), 'Cell')} not measured ({_statuses(bad)})" if bad else "",
            f"{plural(missing, 'Cell')} without any Record" if missing else "",
            plural(len(run.broken), "unreadable file") if run.broken else "",
            f"the run is {how}" if how != "finished" else "",
        ), Exit.INFRASTRUCTURE

    undecided = [j for j in judgements if j.verdict.word is not VerdictKind.PASS]
    if undecided:
        open_questions = f"{len(undecided)} of {len(judgements)} questions left open"
        ids = [i for j in undecided for i in j.verdict.records]
        return verdict(VerdictKind.INCONCLUSIVE, ids, open_questions, _conform(ok)), Exit.PASS
    questions = f" and all {len(judgements)} questions of the suite are answered yes" if judgements else ""
    return verdict(VerdictKind.PASS, [r.id for r in ok], f"{_conform(ok)}{questions}"), Exit.PASS


def _conform(ok: list[Record]) -> str:
    """Return a sentence that the measured Cells conform, with the number of those without a reference."""
    unreferenced = sum(bool(parity.unreferenced(r)) for r in ok)
    exception = f", {unreferenced} of them without a reference to compare with" if unreferenced else ""
    return f"all {len(ok)} measured Cells conform{exception}"


def _failed_checks(name: str, record: Record) -> str:
    failed = [c.check for c in parity.failed(record)]
    why = f"{first_names(failed, 2)} failed" if failed else record.because
    return f"{name}: {why}" if why else name


def _statuses(records: list[Record]) -> str:
    return ", ".join(f"{n} {status}" for status, n in Counter(r.status.value for r in records).items())
