"""Judge a run: each question of its suite, and the run as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from harness.analysis import failed_checks as parity
from harness.analysis import trajectories
from harness.analysis.ranking import Score, accuracies, score, why_not_comparable
from harness.analysis.statistics import over_seeds
from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.errors import Exit, plural
from harness.records import naming
from harness.records.manifest import Comparison
from harness.records.record import Cell, Outcome, Record, Status
from harness.records.store import Run

_SHOWN = 4
"""Most reasons for a missing verdict in one sentence; a matrix may have hundreds."""
_SO = (VerdictKind.FAIL, VerdictKind.INCONCLUSIVE)
UNMEASURED = (Status.OOM, Status.TIMEOUT, Status.ERROR, Status.LOST)


@dataclass(frozen=True)
class QuestionVerdict:
    """Verdict on one question of the suite."""

    comparison: Comparison
    """The question."""
    verdict: Verdict
    losses: trajectories.SameLosses | None = None
    """Steps of a `same-losses` comparison."""


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
    """Cells per status (`missing` and `changed` among them)."""
    nonconforming: tuple[str, ...]
    """Ids of Records that depart from their Method, or diverged."""
    missing: tuple[str, ...]
    """cell_ids without a Record."""
    how: str
    """End of the run: `finished`, `interrupted`, `failed`, or `incomplete` without a footer."""
    judgements: tuple[QuestionVerdict, ...]
    """Verdicts on the questions of the suite."""
    parity: Parity
    """Counts of the checks."""

    def exit_code(self, *, strict: bool) -> Exit:
        """Return the exit code; with `strict`, open questions are not a pass."""
        left_open = self.exit is Exit.PASS and self.verdict.word is VerdictKind.INCONCLUSIVE
        return Exit.INCONCLUSIVE if strict and left_open else self.exit


def judge(run: Run) -> RunVerdict:
    """Judge every comparison of a run, then the run.

    Precedence of the exit codes: FAIL comes first, for a non-conformance, a refuted comparison or a file that was changed
    after the run, since no missing Cell can undo such a finding. It also precedes NOTHING_COMPARED: a run with only
    nonconforming Cells did compare something. Then nothing measured, then Cells not measured. Open questions are a PASS,
    except for `exit_code(strict=True)`.
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
        left_out = f"{plural(len(unknown), 'Cell')} of this question not in this run, e.g. because of --only: "
        left_out += ", ".join(unknown)
        return QuestionVerdict(comparison, Verdict(VerdictKind.NOT_RUN, left_out))
    if comparison.kind == "same-losses":
        losses = trajectories.judge(comparison, cells, latest)
        return QuestionVerdict(comparison, losses.verdict, losses)
    return QuestionVerdict(comparison, _better(comparison, run, latest))


def _better(comparison: Comparison, run: Run, latest: dict[str, Record]) -> Verdict:
    cells = {cell.cell_id: cell for cell in run.manifest.cells}
    left_sides, right_sides = (_recipes(ids, cells) for ids in (comparison.left, comparison.right))
    pairs = [(left, right) for left in left_sides for right in right_sides]
    named = naming.full(cells.values()) | naming.recipes(cells.values())
    ids = tuple(latest[i].id for i in dict.fromkeys(comparison.left + comparison.right) if i in latest)
    # By verdict: the gap and the sentence of each pair.
    found: dict[VerdictKind, list[tuple[float, str]]] = {word: [] for word in VerdictKind}
    for left, right in pairs:
        names = [named[side[0] if len(side) == 1 else cells[side[0]].recipe_id] for side in (left, right)]
        refusal = why_not_comparable(cells[left[0]], cells[right[0]])
        if refusal:
            found[VerdictKind.NOT_RUN].append((0.0, f"{names[0]} and {names[1]} are not comparable: {refusal}"))
            continue
        lacking = [(0.0, f"{named[i]} {why}") for i in (*left, *right) if (why := _why_no_accuracy(latest.get(i)))]
        if lacking:
            found[VerdictKind.NOT_RUN] += lacking
            continue
        word, gap, sentence = _apart([latest[i] for i in left], [latest[i] for i in right], names)
        found[word].append((gap, sentence))
    several = any(len(side) > 1 for side in (*left_sides, *right_sides))
    for word, says in (
        (VerdictKind.FAIL, "the opposite holds"),
        (VerdictKind.NOT_RUN, "not judged"),
        (VerdictKind.INCONCLUSIVE, "the interval of the difference holds 0" if several else "the intervals overlap"),
        (VerdictKind.PASS, "the interval of the difference lies above 0" if several else "the intervals lie apart"),
    ):
        if found[word]:
            sentences = list(dict.fromkeys(sentence for _, sentence in sorted(found[word])))
            # The worst pair stands for the others; reasons for a missing verdict are listed one by one.
            shown = sentences[:_SHOWN] if word is VerdictKind.NOT_RUN else sentences[:1]
            if word is VerdictKind.NOT_RUN and len(sentences) > _SHOWN:
                shown.append(f"and {len(sentences) - _SHOWN} more")
            more = f" (the closest of {len(pairs)} pairs)" if word is VerdictKind.PASS and len(pairs) > 1 else ""
            more = f" ({len(sentences)} of {len(pairs)} pairs so)" if word in _SO and len(pairs) > 1 else more
            return Verdict(word, f"{says}: {'; '.join(shown)}{more}", ids)
    return Verdict(VerdictKind.NOT_RUN, "it names no Cells", ids)


def _recipes(ids: list[str], cells: Mapping[str, Cell]) -> list[list[str]]:
    """Group the Cells that differ in the seed alone, in the order of their seeds."""
    found: dict[str, list[str]] = {}
    for cell_id in sorted(ids, key=lambda i: cells[i].seed):
        found.setdefault(cells[cell_id].recipe_id, []).append(cell_id)
    order = list(dict.fromkeys(cells[i].recipe_id for i in ids))
    return [found[recipe] for recipe in order]


def _apart(left: list[Record], right: list[Record], names: list[str]) -> tuple[VerdictKind, float, str]:
    """Judge one pair: by the interval of its difference over seeds, or, with one run each, by both intervals."""
    a, b = score(left), score(right)
    sentence = f"{names[0]} {_interval(a)} against {names[1]} {_interval(b)}"
    if len(left) == len(right) == 1:
        word = VerdictKind.PASS if a.low > b.high else VerdictKind.FAIL if a.high < b.low else VerdictKind.INCONCLUSIVE
        return word, a.low - b.high, sentence
    seeds = [[record.cell.seed for record in side] for side in (left, right)]
    if seeds[0] != seeds[1]:
        return VerdictKind.NOT_RUN, 0.0, f"{sentence}: their seeds are not the same, {seeds[0]} against {seeds[1]}"
    found = over_seeds.difference(accuracies(left), accuracies(right))
    if found is None:
        return VerdictKind.NOT_RUN, 0.0, f"{sentence}: they were not scored on the same items"
    low, high = found.interval
    word = VerdictKind.PASS if low > 0 else VerdictKind.FAIL if high < 0 else VerdictKind.INCONCLUSIVE
    apart = f"{100 * found.value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    return word, low, f"{sentence}: {apart} over {len(left)} seeds"


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
    refuted = [j for j in judgements if j.verdict.word is VerdictKind.FAIL]
    if nonconforming or refuted or run.changed:
        names = naming.full(run.manifest.cells)
        departed = [r for r in latest.values() if r.id in nonconforming]
        diverged = [names[r.cell_id] for r in departed if parity.diverged(r)]
        others = [_red(names[r.cell_id], r) for r in departed if not parity.diverged(r)]
        reasons = [f"not as the run left them: {', '.join(run.changed)}"] if run.changed else []
        reasons += (
            [f"{plural(len(others), 'Cell')} not computing what the Method says ({'; '.join(others)})"]
            if others
            else []
        )
        reasons += [f"training of {plural(len(diverged), 'Cell')} diverged ({'; '.join(diverged)})"] if diverged else []
        reasons += [f"refuted: “{j.comparison.says}”" for j in refuted]
        ids = (*nonconforming, *(i for j in refuted for i in j.verdict.records))
        return Verdict(VerdictKind.FAIL, "; ".join(reasons), tuple(dict.fromkeys(ids))), Exit.FAIL

    ok = [r for r in latest.values() if r.status is Status.OK]
    # A Cell that was prevented from running is a fault of the machine; a Cell that cannot run here is not.
    bad = [r for r in latest.values() if r.status in UNMEASURED or (r.status is Status.SKIPPED and r.failure)]
    if not ok and not bad:
        nothing = Verdict(VerdictKind.NOT_RUN, "no Cell was measured", tuple(r.id for r in latest.values()))
        return nothing, Exit.NOTHING_COMPARED

    lacking = len(run.missing())
    if bad or lacking or run.broken or how != "finished":
        reasons = [f"{plural(len(bad), 'Cell')} not measured ({_statuses(bad)})"] if bad else []
        reasons += [f"{plural(lacking, 'Cell')} without any Record"] if lacking else []
        reasons += [plural(len(run.broken), "unreadable file")] if run.broken else []
        reasons += [f"the run is {how}"] if how != "finished" else []
        return Verdict(VerdictKind.INCONCLUSIVE, "; ".join(reasons), tuple(r.id for r in bad)), Exit.INFRASTRUCTURE

    undecided = [j for j in judgements if j.verdict.word is not VerdictKind.PASS]
    if undecided:
        reason = f"{len(undecided)} of {len(judgements)} questions left open; {_conform(ok)}"
        ids = tuple(dict.fromkeys(i for j in undecided for i in j.verdict.records))
        return Verdict(VerdictKind.INCONCLUSIVE, reason, ids), Exit.PASS
    questions = f" and all {len(judgements)} questions of the suite are answered yes" if judgements else ""
    return Verdict(VerdictKind.PASS, f"{_conform(ok)}{questions}", tuple(r.id for r in ok)), Exit.PASS


def _conform(ok: list[Record]) -> str:
    """Return a sentence that the measured Cells conform, with the number of those without a reference."""
    alone = sum(bool(parity.unreferenced(r)) for r in ok)
    return f"all {len(ok)} measured Cells conform" + (
        f", {alone} of them without a reference to compare with" if alone else ""
    )


def _red(name: str, record: Record) -> str:
    red = [c.check for c in parity.failed(record)]
    more = f" and {len(red) - 2} more" if len(red) > 2 else ""
    why = f"{', '.join(red[:2])}{more} failed" if red else record.because
    return f"{name}: {why}" if why else name


def _statuses(records: list[Record]) -> str:
    return ", ".join(f"{n} {status}" for status, n in Counter(r.status.value for r in records).items())
