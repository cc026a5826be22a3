"""Judge a run: each question its suite asks, and the run as a whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from harness.analysis import naming, parity, trajectories
from harness.analysis.ranking import why_not_comparable
from harness.analysis.words import Verdict, Word
from harness.errors import Exit
from harness.manifest import Comparison
from harness.records import Accuracy, Outcome, Record, Status
from harness.store import Run

_SO = (Word.FAIL, Word.INCONCLUSIVE)
UNMEASURED = (Status.OOM, Status.TIMEOUT, Status.ERROR, Status.LOST)


@dataclass(frozen=True)
class Judgement:
    """A comparison with its verdict; `losses` holds the steps of a `same-losses` comparison."""

    comparison: Comparison
    verdict: Verdict
    losses: trajectories.SameLosses | None = None


@dataclass(frozen=True)
class Parity:
    """Checks of all Cells, counted. `unchecked` are ok Records that carry no passed check."""

    passed: int
    failed: int
    skipped: int
    unchecked: tuple[str, ...]


@dataclass(frozen=True)
class RunVerdict:
    """A run, judged.

    counts: Cells per status (`missing` and `changed` among them). nonconforming: ids of Records that compute something
    else, or diverged.
    how: `finished`, `interrupted`, `failed`, or `incomplete` for a run without its footer.
    """

    verdict: Verdict
    exit: Exit
    counts: dict[str, int]
    nonconforming: tuple[str, ...]
    missing: tuple[str, ...]
    how: str
    judgements: tuple[Judgement, ...]
    parity: Parity


def judge(run: Run, *, strict: bool = False) -> RunVerdict:
    """Judge every comparison of a run, then the run.

    Precedence of the exit codes: a non-conformance, a refuted comparison or a file that was changed after the run is a
    finding, and no missing Cell can take it back, so FAIL comes first, also before NOTHING_COMPARED (a run whose every Cell
    is nonconforming did compare something). Then nothing measured, then Cells not measured, then (with `strict`) questions
    left open.
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
    verdict, code = _whole(run, latest, judgements, nonconforming, how, strict)
    return RunVerdict(verdict, code, dict(counts), nonconforming, missing, how, judgements, _parity(latest))


def _parity(latest: dict[str, Record]) -> Parity:
    outcomes = Counter(check.outcome for record in latest.values() for check in record.checks)
    unchecked = tuple(
        r.id for r in latest.values() if r.status is Status.OK and not any(c.outcome is Outcome.PASS for c in r.checks)
    )
    return Parity(outcomes[Outcome.PASS], outcomes[Outcome.FAIL], outcomes[Outcome.SKIPPED], unchecked)


def _judge_comparison(comparison: Comparison, run: Run, latest: dict[str, Record]) -> Judgement:
    cells = {cell.cell_id: cell for cell in run.manifest.cells}
    unknown = [i for i in (*comparison.left, *comparison.right) if i not in cells]
    if unknown:
        left_out = f"{_cells(len(unknown))} that it asks about not in this run, e.g. for --only: {', '.join(unknown)}"
        return Judgement(comparison, Verdict(Word.NOT_RUN, left_out))
    if comparison.kind == "same-losses":
        losses = trajectories.judge(comparison, cells, latest)
        return Judgement(comparison, losses.verdict, losses)
    return Judgement(comparison, _better(comparison, run, latest))


def _better(comparison: Comparison, run: Run, latest: dict[str, Record]) -> Verdict:
    cells = {cell.cell_id: cell for cell in run.manifest.cells}
    named = naming.full(cells.values())
    pairs = [(left, right) for left in comparison.left for right in comparison.right]
    ids = tuple(latest[i].id for i in dict.fromkeys(comparison.left + comparison.right) if i in latest)
    # Per word: how far each pair's intervals lie apart, and the sentence about it.
    found: dict[Word, list[tuple[float, str]]] = {word: [] for word in Word}
    for left, right in pairs:
        names = f"{named[left]} and {named[right]}"
        refusal = why_not_comparable(cells[left], cells[right])
        if refusal:
            found[Word.NOT_RUN].append((0.0, f"{names} are not comparable: {refusal}"))
            continue
        a, b = _accuracy(latest.get(left)), _accuracy(latest.get(right))
        if isinstance(a, str) or isinstance(b, str):
            scores = ((left, a), (right, b))
            found[Word.NOT_RUN] += [(0.0, f"{named[i]} {why}") for i, why in scores if isinstance(why, str)]
            continue
        sentence = f"{named[left]} {_interval(a)} against {named[right]} {_interval(b)}"
        word = Word.PASS if a.low > b.high else Word.FAIL if a.high < b.low else Word.INCONCLUSIVE
        found[word].append((a.low - b.high, sentence))
    for word, says in (
        (Word.FAIL, "the opposite holds"),
        (Word.NOT_RUN, "not judged"),
        (Word.INCONCLUSIVE, "the intervals overlap"),
        (Word.PASS, "the intervals lie apart"),
    ):
        if found[word]:
            sentences = list(dict.fromkeys(sentence for _, sentence in sorted(found[word])))
            # The pair that stands worst tells of the others; reasons for not judging are each their own.
            shown = sentences if word is Word.NOT_RUN else sentences[:1]
            more = f" (the closest of {len(pairs)} pairs)" if word is Word.PASS and len(pairs) > 1 else ""
            more = f" ({len(sentences)} of {len(pairs)} pairs so)" if word in _SO and len(pairs) > 1 else more
            return Verdict(word, f"{says}: {'; '.join(shown)}{more}", ids)
    return Verdict(Word.NOT_RUN, "it names no Cells", ids)


def _accuracy(record: Record | None) -> Accuracy | str:
    if record is None:
        return "is missing"
    if record.measurements is None:
        return f"is {record.status.value}: {record.because}"
    return record.measurements.accuracy or "was not scored"


def _interval(a: Accuracy) -> str:
    return f"{100 * a.value:.1f} % [{100 * a.low:.1f}, {100 * a.high:.1f}]"


def _whole(
    run: Run,
    latest: dict[str, Record],
    judgements: tuple[Judgement, ...],
    nonconforming: tuple[str, ...],
    how: str,
    strict: bool,
) -> tuple[Verdict, Exit]:
    refuted = [j for j in judgements if j.verdict.word is Word.FAIL]
    if nonconforming or refuted or run.changed:
        names = naming.full(run.manifest.cells)
        departed = [r for r in latest.values() if r.id in nonconforming]
        diverged = [names[r.cell_id] for r in departed if parity.diverged(r)]
        others = [_red(names[r.cell_id], r) for r in departed if not parity.diverged(r)]
        reasons = [f"not as the run left them: {', '.join(run.changed)}"] if run.changed else []
        reasons += [f"{_cells(len(others))} not computing what the Method says ({'; '.join(others)})"] if others else []
        reasons += [f"training of {_cells(len(diverged))} diverged ({'; '.join(diverged)})"] if diverged else []
        reasons += [f"refuted: “{j.comparison.says}”" for j in refuted]
        ids = (*nonconforming, *(i for j in refuted for i in j.verdict.records))
        return Verdict(Word.FAIL, "; ".join(reasons), tuple(dict.fromkeys(ids))), Exit.FAIL

    ok = [r for r in latest.values() if r.status is Status.OK]
    bad = [r for r in latest.values() if r.status in UNMEASURED]
    if not ok and not bad:
        nothing = Verdict(Word.NOT_RUN, "no Cell was measured", tuple(r.id for r in latest.values()))
        return nothing, Exit.NOTHING_COMPARED

    lacking = len(run.missing())
    if bad or lacking or run.broken or how != "finished":
        reasons = [f"{_cells(len(bad))} not measured ({_statuses(bad)})"] if bad else []
        reasons += [f"{_cells(lacking)} without any Record"] if lacking else []
        reasons += [f"{len(run.broken)} unreadable file{'s' * (len(run.broken) != 1)}"] if run.broken else []
        reasons += [f"the run is {how}"] if how != "finished" else []
        return Verdict(Word.INCONCLUSIVE, "; ".join(reasons), tuple(r.id for r in bad)), Exit.INFRASTRUCTURE

    undecided = [j for j in judgements if j.verdict.word is not Word.PASS]
    if undecided:
        reason = f"{len(undecided)} of {len(judgements)} questions left open; {_conform(ok)}"
        ids = tuple(dict.fromkeys(i for j in undecided for i in j.verdict.records))
        return Verdict(Word.INCONCLUSIVE, reason, ids), Exit.INCONCLUSIVE if strict else Exit.PASS
    questions = f" and all {len(judgements)} questions of the suite are answered yes" if judgements else ""
    return Verdict(Word.PASS, f"{_conform(ok)}{questions}", tuple(r.id for r in ok)), Exit.PASS


def _conform(ok: list[Record]) -> str:
    """Say that nothing was found against the measured Cells, and of how many nothing could be compared."""
    alone = sum(bool(parity.unreferenced(r)) for r in ok)
    return f"all {len(ok)} measured Cells conform" + (
        f", {alone} of them without a reference to compare with" if alone else ""
    )


def _red(name: str, record: Record) -> str:
    red = [c.check for c in parity.failed(record)]
    more = f" and {len(red) - 2} more" if len(red) > 2 else ""
    why = f"{', '.join(red[:2])}{more} failed" if red else record.because
    return f"{name}: {why}" if why else name


def _cells(n: int) -> str:
    return f"{n} Cell{'s' * (n != 1)}"


def _statuses(records: list[Record]) -> str:
    return ", ".join(f"{n} {status}" for status, n in Counter(r.status.value for r in records).items())
