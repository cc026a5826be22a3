"""`history confirm`: store the verdict of a person on a change that `detect` shows."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.regression.history import decisions
from harness.regression.history.decisions import NEAR, ConfirmationVerdict
from harness.regression.history.detect import all_changes
from harness.regression.history.night_files import Decision


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: ConfirmationVerdict, evidence: str, author: str | None
) -> Decision:
    """Store a verdict, and warn if no change is near.

    A verdict on a change of exactly this series is stored with the night and the levels of the change, so that it stands on
    later nights too. Raises UsageError as `decisions.confirm` does.
    """
    history, decision = decisions.checked(folder, cell, metric, night, evidence, author, "--evidence")
    nights, seen = [n.night for n in history.nights], None
    cell, at = decision["cell"], nights.index(night)
    near = [
        change for change in all_changes(history)
        if decisions.matches(cell, metric, change.cell, change.metric) and abs(nights.index(change.night) - at) <= NEAR
    ]  # fmt: skip
    if not near:
        print(
            f"no change of {metric} within {NEAR} nights of {night}: this verdict applies if `detect` shows one later",
            file=sys.stderr,
        )
    if own := [change for change in near if (change.cell, change.metric) == (cell, metric)]:
        nearest = min(own, key=lambda change: abs(nights.index(change.night) - at))
        night, seen = nearest.night, nearest.evidence()
    return decisions.confirm(folder, cell, metric, night, verdict, evidence, author, seen=seen)
