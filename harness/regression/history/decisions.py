"""Decisions about a history: accepted levels (resets), and verdicts on changes.

Each decision is a line of resets.jsonl or confirmations.jsonl, with its author, time and reason. The files are
committed to git, so that the code and the reason of an accepted slow-down are in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from harness.analysis import tracked_metrics
from harness.console import print_lines
from harness.errors import Exit, Problem, UsageError, collect_errors, usage_error
from harness.records import store
from harness.regression import git
from harness.regression.history import night_files
from harness.regression.history.night_files import EVERY, Decision, History

ConfirmationVerdict = Literal["regressed", "improved", "refuted"]
_HINTS = {"--reason": "give the reason, e.g. the change that caused it", "--evidence": "name the test and its result"}


def reset(folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None) -> Decision:
    """Accept the level of a series from `night` on. Store and return the decision.

    cell: the start of a cell_id, or `*`. metric: a name, or `*`. author: if None, git's user. Raises UsageError that
    lists all mistakes in the arguments.
    """
    _, decision = checked(folder, cell, metric, night, reason, author, "--reason")
    night_files.append_decision(folder, night_files.RESETS, decision)
    return decision


def confirm(folder: Path, decision: Decision, verdict: ConfirmationVerdict) -> Decision:
    """Store a decision with a verdict on a change, and return it."""
    confirmed = decision.model_copy(update={"verdict": verdict})
    night_files.append_decision(folder, night_files.CONFIRMATIONS, confirmed)
    return confirmed


def print_decision(decision: Decision) -> Exit:
    """Print a stored decision, and return PASS."""
    what = f"{decision.cell} {decision.metric} from {decision.night} on"
    print_lines([f"{what}, by {decision.author}: {decision.reason}"])
    return Exit.PASS


def last_reset(resets: Iterable[Decision], cell: str, metric: str) -> str:
    """Return the first night of the level that a user last accepted for a series. If there is none, return ""."""
    return max((decision.night for decision in resets if decision.applies(cell, metric)), default="")


def new(cell: str, metric: str, night: str, reason: str, author: str) -> Decision:
    """Return a new decision with the current time."""
    reason = " ".join(reason.split())
    return Decision(cell=cell, metric=metric, night=night, reason=reason, author=author, made=store.now())


def checked(
    folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None, option: str
) -> tuple[History, Decision]:
    """Check the arguments of a decision. Return the history in `folder` and the decision. Write nothing.

    cell: the start of a cell_id, or `*`. metric: a name, or `*`. author: if None, git's user is the author. option: the
    command-line option that gave `reason`. Raises UsageError that lists all mistakes: a Cell, metric or night that is
    not in the history, an empty reason, or no author.
    """
    problems: list[Problem] = []
    with collect_errors(problems):
        history = _nonempty_history(folder)
    if not problems:
        with collect_errors(problems):
            cell = _find_cell(history.cells, cell)
        with collect_errors(problems):
            _check_metric(history, metric)
        with collect_errors(problems):
            _check_night(history, night)
    with collect_errors(problems):
        if not reason.strip():
            raise UsageError(f"the {option.strip('-')} is empty", where=option, hint=_HINTS[option])
    with collect_errors(problems):
        author = find_author(author)
    if problems:
        raise usage_error(problems)
    return history, new(cell, metric, night, reason, str(author))


def _nonempty_history(folder: Path) -> History:
    history = night_files.read(folder)
    if not history.nights:
        hint = "`peft-harness history add RUN` adds one; or name the history's folder"
        raise UsageError(f"no night in {folder}", where="--dir", hint=hint)
    return history


def _find_cell(cells: Iterable[str], start: str) -> str:
    """Return the one cell_id that starts with `start`. If `start` is `*`, return `*`.

    Raises UsageError if no cell_id or several cell_ids start with `start`.
    """
    found = [EVERY] if start == EVERY else [cell_id for cell_id in cells if start and cell_id.startswith(start)]
    if len(found) == 1:
        return found[0]
    what = f"{start!r} is the start of {len(found)} ids" if found else f"no Cell {start!r} in this history"
    raise UsageError(what, where="CELL", hint="give (more of) its id, as `peft-harness history show` prints it; or `*`")


def _check_metric(history: History, metric: str) -> None:
    names = {name for night in history.nights for row in night.rows for name in row.get("values", ())}
    if metric not in names | {name.partition("/")[0] for name in names} | {EVERY}:
        what = "no such metric in this history" if tracked_metrics.kind(metric) else "not a metric"
        raise UsageError(f"{what}: {metric!r}", where="METRIC", hint="`peft-harness history show` names them; or `*`")


def _check_night(history: History, night: str) -> None:
    if night not in history.index:
        hint = f"the last ones are {', '.join(list(history.index)[-3:])}"
        raise UsageError(f"no night {night!r} in this history", where="--night", hint=hint)


def find_author(author: str | None) -> str:
    """Return the given author, or git's user if `author` is empty. Raises UsageError if git has no user."""
    if found := (author or "").strip() or git.user():
        return found
    hint = 'name the person who decides: --author "..."'
    raise UsageError("no author: git has no user.name here", where="--author", hint=hint)
