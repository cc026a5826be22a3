"""`history settle`: confirm or refute changes of times by pairs of runs, and store the verdicts."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.analysis import tracked_metrics
from harness.analysis.statistics.paired import PairFinding, PairVerdict
from harness.console import print_lines
from harness.errors import Exit, HarnessError
from harness.records import store
from harness.regression.history import cell_names, decisions, night_files
from harness.regression.history.decisions import ConfirmationVerdict
from harness.regression.history.detect import detection
from harness.regression.history.findings import JudgedChange
from harness.regression.pairs import gate
from harness.regression.pairs.gate import PairsResult


def verify(
    folder: Path, cell: str | None, most: int, author: str | None, out: Path | None, suite: Path | None = None
) -> Exit:
    """For each unconfirmed change, compare old and new code by pairs of runs. Print the verdicts; return the exit code.

    cell: an expression that selects Cells. most: largest number of changes to try. author: if None, git's user. out:
    folder for the runs. suite: the file of the nightly suite, if the suite is not part of the harness. Only the first
    comparison has a canary, i.e. also compares a revision with itself. Raises UsageError if `cell` selects nothing or
    if there is no author.
    """
    author = decisions.find_author(author)  # first, since no verdict could be stored without an author
    history = night_files.read(folder)
    found = detection(history, only=cell_names.select(history, cell) if cell else None)
    unconfirmed = [c for c in (*found.suspects, *found.candidates) if c.is_open]
    pairable = sorted((c for c in unconfirmed if c.can_be_paired), key=lambda c: -abs(c.change or 0.0))
    runs = out or store.RUNS / f"{store.now().replace(':', '').replace('-', '')}-settle-{secrets.token_hex(3)}"
    codes: list[Exit] = []
    canary = True
    for number, change in enumerate(pairable[:most]):
        if change.between.request is None:
            continue
        request = replace(change.between.request, out=runs / str(number), metric=change.metric, canary=canary)
        try:
            result = gate.gate(replace(request, suite=str(suite)) if suite else request, as_json=False)
        except HarnessError as error:
            print_lines([f"{change.name}: not tried: {error.lines()[0]}", *error.lines()[1:]])
            codes.append(Exit.INFRASTRUCTURE)
            continue
        canary = False
        place = history.night(change.night).places[change.place]
        codes.append(_store_verdict(folder, change, place, result, author))
        if result.interrupted:
            break
    print_lines(_not_tried(unconfirmed, pairable, len(codes)))
    if not unconfirmed:
        print_lines(["nothing to try: no change needs a confirmation"])
    return max(codes, default=Exit.PASS)


def _store_verdict(
    folder: Path, change: JudgedChange, place: Mapping[str, str], result: PairsResult, author: str
) -> Exit:
    """Store and print the verdict on a change, or print why there is no clear verdict. Return the exit code."""
    verdict, reason = _verdict(change, place, result)
    if verdict is None:
        print_lines([f"{change.name}: still open: {reason}"])
        failed = result.interrupted or _timed(change, result) is None
        return Exit.INFRASTRUCTURE if failed else Exit.INCONCLUSIVE
    reason = f"{reason}; seed {result.runner.seed}"
    decision = decisions.new(change.cell, change.metric, change.night, reason, author)
    evidence = {"revisions": list(change.between.paired), "seen": change.evidence()}
    decision = decisions.confirm(folder, decision.model_copy(update=evidence), verdict)
    print_lines([f"{change.name}: {verdict} from {change.night} on: {decision.reason}"])
    return Exit.PASS


def _timed(change: JudgedChange, result: PairsResult) -> PairVerdict | None:
    """Return the verdict of the pairs on the metric that changed; None if the pairs have no times of that metric."""
    return next((cell.timed.get(change.metric) for cell in result.judged.cells), None)


def _verdict(
    change: JudgedChange, place: Mapping[str, str], result: PairsResult
) -> tuple[ConfirmationVerdict | None, str]:
    """Return the verdict on a change, and the reason for it. If the pairs do not decide, the verdict is None."""
    timed, canaries = _timed(change, result), result.judged.canaries
    if timed is None:
        return None, result.judged.verdict.reason
    if canaries.closed:
        return None, canaries.sentence
    if elsewhere := _other_place(place, result):
        return None, f"the pairs ran at another place than the night ({'; '.join(elsewhere)}): {timed.sentence}"
    if timed.word is PairFinding.INCONCLUSIVE:
        return None, timed.sentence
    verdict: ConfirmationVerdict
    if timed.word is PairFinding.SLOWER:
        verdict = "regressed"
    elif timed.word is PairFinding.FASTER and not change.worse:
        verdict = "improved"
    else:
        verdict = "refuted"
    if verdict == "refuted" and (libraries := change.between.libraries):
        return None, f"pairs cannot refute it, since libraries changed ({', '.join(libraries)}): {timed.sentence}"
    return verdict, timed.sentence


def _other_place(place: Mapping[str, str], result: PairsResult) -> list[str]:
    """List the differences between the place (machine and software) of a night and the places of the pairs of runs.

    Whether other Cells ran at the same time is not compared.
    """
    records = [record for one in result.runner.found for pair in one.records for record in pair]
    shared = {key: value for key, value in place.items() if key == tracked_metrics.CONCURRENT}
    places = [tracked_metrics.place(record) | shared for record in records]
    return sorted({difference for here in places for difference in tracked_metrics.place_changes(place, here)})


def _not_tried(unconfirmed: Sequence[JudgedChange], pairable: Sequence[JudgedChange], tried: int) -> Iterator[str]:
    for change in pairable[tried:]:
        yield f"{change.name}: not tried, {100 * (change.change or 0.0):+.1f} %: `{change.between.command}`"
    for change in unconfirmed:
        if change not in pairable:
            command = change.between.command
            why = f"only times of single Cells are tried here: `{command}`" if command else change.between.because
            yield f"{change.name}: {change.metric}: not tried: {why}"
