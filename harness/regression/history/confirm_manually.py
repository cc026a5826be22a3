"""The verb `history confirm`: somebody writes down what became of a change that `detect` shows."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.regression.history import decisions
from harness.regression.history.decisions import NEAR, Verdict
from harness.regression.history.detect import all_changes
from harness.regression.history.night_files import Line


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: Verdict, evidence: str, author: str | None
) -> Line:
    """Write a verdict down; return the line. Of a change of that very series, with its own night and what it looks like, so
    that the verdict stands on later nights too; where no change is near, that is said.

    Raises UsageError as `decisions.confirm` does.
    """
    history, line = decisions.checked(folder, cell, metric, night, evidence, author, "--evidence")
    nights, seen = [n.night for n in history.nights], None
    about, at = {"cell": line["cell"], "metric": metric}, nights.index(night)
    near = [
        c for c in all_changes(history)
        if decisions.concerns(about, c["cell"], c["metric"]) and abs(nights.index(c["night"]) - at) <= NEAR
    ]  # fmt: skip
    if not near:
        told = f"no change of {metric} is seen within {NEAR} nights of {night}: "
        print(f"{told}this holds for one that `detect` may show", file=sys.stderr)
    if own := [c for c in near if about.items() <= c.items()]:
        change = min(own, key=lambda c: abs(nights.index(c["night"]) - at))
        night, facts = change["night"], {name: change[name] for name in ("place", "before", "after")}
        seen = {"old_night": change["between"]["old_night"], **facts}
    return decisions.confirm(folder, cell, metric, night, verdict, evidence, author, seen=seen)
