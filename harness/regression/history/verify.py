"""`history settle`: confirm or refute suspected changes by pairs of runs, and store the verdicts."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.analysis import tracked_metrics
from harness.analysis.statistics.paired import PairFinding
from harness.analysis.tracked_metrics import STEP
from harness.console import echo
from harness.errors import Exit, HarnessError
from harness.records import store
from harness.regression.history import cell_names, decisions, night_files
from harness.regression.history.decisions import ConfirmationVerdict
from harness.regression.history.detect import detection
from harness.regression.history.findings import JudgedChange
from harness.regression.pairs import gate
from harness.regression.pairs.request import PairsRequest


@dataclass(frozen=True)
class PairsOutcome:
    """Result of the pairs for one metric of one Cell."""

    finding: str
    """A PairFinding; empty if the metric was not timed."""
    sentence: str
    canaries: str
    """The sentence on canaries, if they closed the gate."""
    interrupted: bool
    seed: int

    @property
    def failed(self) -> bool:
        """True if the pairs gave no time, or were interrupted."""
        return self.interrupted or not self.finding


def verify(
    folder: Path, cell: str | None, most: int, author: str | None, out: Path | None, suite: Path | None = None
) -> Exit:
    """Run the pairs, print one line per change and return the exit code; see the help of the command.

    suite: the file of the nightly suite, if it is not one that ships. Only the first pairs have a canary. Raises UsageError
    for a cell that selects nothing, and if there is no author.
    """
    author = decisions.find_author(author)  # before anything runs: without an author, no verdict could be stored
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
        place = next(night.places[change.place] for night in history.nights if change.place in night.places)
        request = replace(change.between.request, out=runs / str(number), metric=change.metric, canary=canary)
        request = replace(request, suite=str(suite)) if suite else request
        code, interrupted = _try(folder, change, place, author, request)
        canary = canary and not (runs / str(number) / gate.DOCUMENT).exists()
        codes.append(code)
        if interrupted:
            break
    for line in _not_tried(unconfirmed, pairable, len(codes)):
        echo(line)
    if not unconfirmed:
        echo("nothing to try: no time lies above its level")
    return max(codes, default=Exit.PASS)


def _try(
    folder: Path, change: JudgedChange, place: Mapping[str, str], author: str, request: PairsRequest
) -> tuple[Exit, bool]:
    """Run the pairs of one change and store a clear verdict; return the exit code and whether they were interrupted."""
    try:
        outcome = _run_pairs(request)
    except HarnessError as error:
        echo(f"{change.name}: not tried: {error}")
        return Exit.INFRASTRUCTURE, False
    verdict, sentence = _verdict(outcome, change, place, request)
    if verdict is None:
        echo(f"{change.name}: still open: {sentence}")
        return (Exit.INFRASTRUCTURE if outcome.failed else Exit.INCONCLUSIVE), outcome.interrupted
    decision = decisions.confirm(
        folder, change.cell, change.metric, change.night, verdict, f"{sentence}; seed {outcome.seed}", author,
        change.between.paired, change.evidence(),
    )  # fmt: skip
    echo(f"{change.name}: {verdict} from {change.night} on: {decision['reason']}")
    return Exit.PASS, outcome.interrupted


def _verdict(
    outcome: PairsOutcome, change: JudgedChange, place: Mapping[str, str], request: PairsRequest
) -> tuple[ConfirmationVerdict | None, str]:
    """Return the verdict on a change, or None, and the reason."""
    if not outcome.finding:
        return None, outcome.sentence
    if outcome.canaries:
        return None, outcome.canaries
    if request.out is not None and (elsewhere := _other_place(place, request.out)):
        return None, f"the pairs ran at another place than the night ({'; '.join(elsewhere)}): {outcome.sentence}"
    verdict = _verdict_of(outcome.finding, change.worse)
    if verdict == "refuted" and (libraries := change.between.libraries):
        return None, f"not the code alone; since then {', '.join(libraries)}: {outcome.sentence}"
    return verdict, outcome.sentence


def _verdict_of(finding: str, worse: bool) -> ConfirmationVerdict | None:
    """Return the verdict on a change; a change for the worse is refuted if the new side is faster."""
    if finding == PairFinding.SLOWER:
        return "regressed"
    if finding == PairFinding.FASTER:
        return "refuted" if worse else "improved"
    return "refuted" if finding == PairFinding.SAME else None


def _other_place(place: Mapping[str, str], runs: Path) -> list[str]:
    """List the differences between a place and the place of the runs in a folder, except for Cells that ran at once."""
    folders = [run for run in sorted(runs.iterdir()) if (run / "run.json").is_file()]
    here = [tracked_metrics.place(record) for run in folders for record in store.read_run(run).records]
    shared = {key: value for key, value in place.items() if key == tracked_metrics.CONCURRENT}
    return sorted({difference for one in here for difference in tracked_metrics.place_changes(place, one | shared)})


def _run_pairs(request: PairsRequest) -> PairsOutcome:
    """Run the pairs of a request that has an `out`, and return the outcome for its metric."""
    gate.gate(request, as_json=False)
    document: dict[str, Any] = json.loads((Path(str(request.out)) / gate.DOCUMENT).read_text(encoding="utf-8"))
    cell = document["cells"][0] if document["cells"] else {}
    judged = (cell if request.metric == STEP else cell.get("latencies", {}).get(request.metric, {})).get("verdict")
    return PairsOutcome(
        finding=judged["word"] if judged else "",
        sentence=judged["sentence"] if judged else document["verdict"]["reason"],
        canaries=document["canaries"] if document["closed"] else "",
        interrupted=bool(document["cut"]),
        seed=document["seed"],
    )


def _not_tried(unconfirmed: Sequence[JudgedChange], pairable: Sequence[JudgedChange], tried: int) -> Iterator[str]:
    for change in pairable[tried:]:
        yield f"{change.name}: not tried, {100 * (change.change or 0.0):+.1f} %: `{change.between.command}`"
    for change in unconfirmed:
        if change not in pairable:
            command = change.between.command
            why = f"only times of single Cells are tried here: `{command}`" if command else change.between.because
            yield f"{change.name}: {change.metric}: not tried: {why}"
