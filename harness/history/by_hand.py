"""The verb `history confirm`: somebody writes down what became of a change that `detect` shows."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.history import decisions, files
from harness.history.decisions import NEAR, Verdict
from harness.history.detect import all_changes
from harness.history.files import Line


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: Verdict, evidence: str, author: str | None
) -> Line:
    """Write a verdict down; return the line. Of a change of that very series, with its own night and what it looks like, so
    that the verdict stands on later nights too; where no change is near, that is said.

    Raises UsageError as `decisions.confirm` does.
    """
    history = files.read(folder)
    if night not in (nights := [n.night for n in history.nights]):
        return decisions.confirm(folder, cell, metric, night, verdict, evidence, author)
    of, at = decisions.known(history.cells, cell), nights.index(night)
    about = {"cell": of, "metric": metric}
    every = [c for c in all_changes(history) if decisions.concerns(about, c["cell"], c["metric"])]
    near = [c for c in every if abs(nights.index(c["night"]) - at) <= NEAR]
    own = [c for c in near if (c["cell"], c["metric"]) == (of, metric)]
    if not near:
        told = (
            f"no change of {metric} is seen within {NEAR} nights of {night}: this holds for one that `detect` may show"
        )
        print(told, file=sys.stderr)
    if not own:
        return decisions.confirm(folder, cell, metric, night, verdict, evidence, author)
    change = min(own, key=lambda c: abs(nights.index(c["night"]) - at))
    seen = {
        "old_night": change["between"]["old_night"],
        **{name: change[name] for name in ("place", "before", "after")},
    }
    return decisions.confirm(folder, cell, metric, change["night"], verdict, evidence, author, seen=seen)
