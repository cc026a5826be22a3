"""The verb `history confirm`: somebody writes down what became of a change that `detect` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.history import decisions, files
from harness.history.decisions import NEAR, Verdict
from harness.history.detect import all_changes
from harness.history.files import History, Line


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: Verdict, evidence: str, author: str | None
) -> Line:
    """Write a verdict down with what made one try it, so that it stands on later nights too; return the line.

    Raises UsageError as `decisions.confirm` does, and where the history has no such change near that night.
    """
    history = files.read(folder)
    seen = None
    if night in (nights := [n.night for n in history.nights]):
        seen = _seen(history, decisions.known(history.cells, cell), metric, nights.index(night))
        if seen is None:
            raise UsageError(
                f"no change of {metric} within {NEAR} nights of {night}: there is nothing to confirm",
                where="--night",
                mend="`peft-harness history detect` names the changes, each with its night",
            )
    return decisions.confirm(folder, cell, metric, night, verdict, evidence, author, seen=seen)


def _seen(history: History, cell: str, metric: str, at: int) -> dict[str, Any] | None:
    """Return what the nearest such change looks like to `detect`, or None where there is none near that night."""
    index = {n.night: i for i, n in enumerate(history.nights)}
    near = [
        (abs(index[c["night"]] - at), c)
        for c in all_changes(history)
        if decisions.concerns({"cell": cell, "metric": metric}, c["cell"], c["metric"])
    ]
    apart, change = min(near, key=lambda one: one[0], default=(NEAR + 1, {}))
    if apart > NEAR:
        return None
    return {
        "old_night": change["between"]["old_night"],
        **{name: change[name] for name in ("place", "before", "after")},
    }
