"""Decisions about a history: accepted levels, and verdicts on changes.

Each is a line of resets.jsonl or confirmations.jsonl with its author, time and reason. The files are committed to git, so
the reason of an accepted slow-down is next to the code.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from harness.analysis import tracked_metrics
from harness.console import echo
from harness.errors import Exit, Problem, StoreError, UsageError, collect_errors, usage_error
from harness.records import store
from harness.regression.history import night_files
from harness.regression.history.night_files import Decision, Evidence, History

EVERY = "*"
NEAR = 2
"""Uncertainty of the night of a change: a decision applies to a change up to this many nights away."""
ConfirmationVerdict = Literal["regressed", "improved", "refuted"]
_HINTS = {"--reason": "say why, e.g. which change it is", "--evidence": "say what was run and what it said"}


def reset(folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None) -> Decision:
    """Accept the level of a series from `night` on, and store the decision.

    cell: the start of a cell_id, or `*`. metric: a name, or `*`. author: git's user if None. Raises UsageError with every
    mistake: a Cell, metric or night that is not in the history, an empty reason, no author.
    """
    _, decision = checked(folder, cell, metric, night, reason, author)
    _append(folder, night_files.RESETS, decision)
    return decision


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: ConfirmationVerdict, evidence: str, author: str | None,
    revisions: Sequence[str] = (), seen: Evidence | None = None,
) -> Decision:  # fmt: skip
    """Store the verdict of pairs of runs on a change.

    revisions: the two that were compared, if known. seen: the change as `detect` saw it. Other arguments and errors as for
    `reset`.
    """
    _, decision = checked(folder, cell, metric, night, evidence, author, "--evidence")
    decision["verdict"] = verdict
    if revisions:
        decision["revisions"] = list(revisions)
    if seen:
        decision["seen"] = seen
    _append(folder, night_files.CONFIRMATIONS, decision)
    return decision


def print_decision(decision: Decision) -> Exit:
    """Print a decision that was stored."""
    where = f"{decision['cell']} {decision['metric']} from {decision['night']} on"
    echo(f"{where}, by {decision['author']}: {decision['reason']}")
    return Exit.PASS


def applies(decision: Decision, cell: str, metric: str) -> bool:
    """Return whether a decision is about a series; one about `latency_s` is about every latency."""
    return matches(decision["cell"], decision["metric"], cell, metric)


def matches(of_cell: str, of_metric: str, cell: str, metric: str) -> bool:
    """Return whether a pattern of Cell and metric, each a name, `*` or a family of metrics, includes a series."""
    return of_cell in (cell, EVERY) and of_metric in (metric, metric.partition("/")[0], EVERY)


def last_reset(resets: Iterable[Decision], cell: str, metric: str) -> str:
    """Return the night of the last reset of a series, or an empty string."""
    return max((decision["night"] for decision in resets if applies(decision, cell, metric)), default="")


def checked(
    folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None, option: str = "--reason"
) -> tuple[History, Decision]:
    """Return the history and a decision about it; nothing is written.

    option: the name of the option that gave `reason`. Raises UsageError with every mistake and its argument or option.
    """
    problems: list[Problem] = []
    with collect_errors(problems):
        history = _nonempty_history(folder)
    if not problems:
        with collect_errors(problems):
            cell = find_cell(history.cells, cell)
        with collect_errors(problems):
            _check_metric(history, metric)
        with collect_errors(problems):
            _check_night(history, night)
    with collect_errors(problems):
        if not reason.strip():
            raise UsageError(f"an empty {option.strip('-')} explains nothing", where=option, hint=_HINTS[option])
    with collect_errors(problems):
        author = find_author(author)
    if problems:
        raise usage_error(problems)
    return history, {
        "schema": night_files.SCHEMA, "cell": cell, "metric": metric, "night": night, "reason": " ".join(reason.split()),
        "author": str(author), "made": store.now(),
    }  # fmt: skip


def _nonempty_history(folder: Path) -> History:
    history = night_files.read(folder)
    if not history.nights:
        hint = "`peft-harness history add RUN` adds one; or name the history's folder"
        raise UsageError(f"no night in {folder}", where="--dir", hint=hint)
    return history


def _check_metric(history: History, metric: str) -> None:
    there = {name for n in history.nights for row in n.rows for name in row.get("values", ())}
    if metric not in there | {name.partition("/")[0] for name in there} | {EVERY}:
        what = "no such metric in this history" if tracked_metrics.kind(metric) else "not a metric"
        raise UsageError(f"{what}: {metric!r}", where="METRIC", hint="`peft-harness history show` names them; or `*`")


def _check_night(history: History, night: str) -> None:
    nights = [n.night for n in history.nights]
    if night not in nights:
        hint = f"the last ones are {', '.join(nights[-3:])}"
        raise UsageError(f"no night {night!r} in this history", where="--night", hint=hint)


def find_cell(cells: Iterable[str], start: str) -> str:
    """Return the one cell_id that starts with `start`; `*` stands for itself. Raises UsageError for none or several."""
    found = [EVERY] if start == EVERY else [cell_id for cell_id in cells if start and cell_id.startswith(start)]
    if len(found) == 1:
        return found[0]
    what = f"{start!r} fits {len(found)} Cells" if found else f"no Cell {start!r} in this history"
    raise UsageError(what, where="CELL", hint="give (more of) its id, as `peft-harness history show` prints it; or `*`")


def find_author(author: str | None) -> str:
    """Return the author, or git's user if None. Raises UsageError if there is neither."""
    if author and author.strip():
        return author.strip()
    name, email = (_git_setting(key) for key in ("user.name", "user.email"))
    if name:
        return name + (f" <{email}>" if email else "")
    raise UsageError(
        "no author: git has no user.name here", where="--author", hint='name the person who decides: --author "..."'
    )


def _git_setting(key: str) -> str:
    try:
        done = subprocess.run(["git", "config", key], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _append(folder: Path, name: str, decision: Decision) -> None:
    """Add a line by rewriting the file; broken lines in it stay as they are."""
    with night_files.locked(folder):
        path = folder / name
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"cannot read: {error}", where=str(path), hint="restore it from git") from error
        night_files.append_line(path, before, decision)
