"""`history confirm`: store a person's verdict on a change that `detect` shows."""

from __future__ import annotations

from pathlib import Path

from harness.console import print_note
from harness.regression.history import decisions
from harness.regression.history.decisions import ConfirmationVerdict
from harness.regression.history.detect import all_changes
from harness.regression.history.night_files import NEAR, Decision


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: ConfirmationVerdict, evidence: str, author: str | None
) -> Decision:
    """Store and return a person's verdict on a change. If there is no change near `night`, print a warning.

    If a change of exactly this Cell and metric is near, its night and levels are stored with the verdict. evidence: the
    reason. Raises UsageError that lists all mistakes in the arguments.
    """
    history, decision = decisions.checked(folder, cell, metric, night, evidence, author, "--evidence")
    changes = [c for c in all_changes(history) if decision.applies(c.cell, c.metric)]
    near = [change for change in changes if history.distance(change.night, night) <= NEAR]
    if not near:
        what = f"no change of {metric} within {NEAR} nights of {night}"
        print_note(f"{what}: this verdict applies if `detect` shows one later")
    own = [change for change in near if (change.cell, change.metric) == (decision.cell, metric)]
    if own:
        nearest = min(own, key=lambda change: history.distance(change.night, night))
        decision = decision.model_copy(update={"night": nearest.night, "seen": nearest.evidence()})
    return decisions.confirm(folder, decision, verdict)
