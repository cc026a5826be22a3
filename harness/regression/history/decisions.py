"""What people decided about a history: a level that is accepted from a night on, and what became of a candidate.

Lines of two files beside the nights, each with its author, the time and a reason: committed, so that who accepted a
slow-down, and why, is found where the code is.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.analysis import tracked_metrics
from harness.console import say
from harness.errors import Exit, Problem, StoreError, UsageError, noted, wrong_use
from harness.records import store
from harness.regression.history import night_files
from harness.regression.history.night_files import History, Line

EVERY = "*"
NEAR = 2
"""A change of level is known to about so many nights; a decision holds for a change up to so many away."""
Verdict = Literal["regressed", "improved", "refuted"]
_SAYS = {"--reason": "say why, e.g. which change it is", "--evidence": "say what was run and what it said"}


def reset(folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None) -> Line:
    """Accept the level of a series from `night` on, and write down who did and why; return the line.

    cell: the start of a cell_id, or `*`. metric: a name, or `*`. author: git's user if None. Raises UsageError for a Cell,
    metric or night that the history does not have, an empty reason, or nobody; for all of them at once.
    """
    _, line = checked(folder, cell, metric, night, reason, author)
    _append(folder, night_files.RESETS, line)
    return line


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: Verdict, evidence: str, author: str | None,
    revisions: Sequence[str] = (), seen: Mapping[str, Any] | None = None,
) -> Line:  # fmt: skip
    """Write down what pairs of runs said of a candidate; return the line.

    revisions: the two that were compared, where that is known. seen: what made one try it: `old_night`, `place`, `before`
    and `after`. Other arguments and errors as for `reset`.
    """
    _, line = checked(folder, cell, metric, night, evidence, author, "--evidence")
    line["verdict"] = verdict
    if revisions:
        line["revisions"] = list(revisions)
    if seen:
        line["seen"] = dict(seen)
    _append(folder, night_files.CONFIRMATIONS, line)
    return line


def print_decision(line: Line) -> Exit:
    """Print a decision that was stored."""
    say(f"{line['cell']} {line['metric']} from {line['night']} on, by {line['author']}: {line['reason']}")
    return Exit.PASS


def concerns(line: Line, cell: str, metric: str) -> bool:
    """Say whether a decision is about a series; one about `latency_s` is about all that begin so."""
    family = metric.partition("/")[0]
    return line["cell"] in (cell, EVERY) and line["metric"] in (metric, family, EVERY)


def start(resets: Iterable[Line], cell: str, metric: str) -> str:
    """Return the night of the last reset of a series, or an empty string."""
    return max((line["night"] for line in resets if concerns(line, cell, metric)), default="")


def checked(
    folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None, text: str = "--reason"
) -> tuple[History, Line]:
    """Return the history and the line of a decision about it; nothing is written.

    text: the option that `reason` was given by. Raises UsageError with every mistake, each with its argument or option.
    """
    problems: list[Problem] = []
    with noted(problems):
        history = _kept(folder)
    if not problems:
        with noted(problems):
            cell = known(history.cells, cell)
        with noted(problems):
            _metric(history, metric)
        with noted(problems):
            _night(history, night)
    with noted(problems):
        if not reason.strip():
            raise UsageError(f"an empty {text.strip('-')} explains nothing", where=text, hint=_SAYS[text])
    with noted(problems):
        author = who(author)
    if problems:
        raise wrong_use(problems)
    return history, {
        "schema": night_files.SCHEMA, "cell": cell, "metric": metric, "night": night, "reason": " ".join(reason.split()),
        "author": author, "made": store.now(),
    }  # fmt: skip


def _kept(folder: Path) -> History:
    history = night_files.read(folder)
    if not history.nights:
        hint = "`peft-harness history add RUN` keeps one; or name the history's folder"
        raise UsageError(f"no night is kept in {folder}", where="--dir", hint=hint)
    return history


def _metric(history: History, metric: str) -> None:
    there = {name for n in history.nights for row in n.rows for name in row.get("values", ())}
    if metric not in there | {name.partition("/")[0] for name in there} | {EVERY}:
        what = "no such metric in this history" if tracked_metrics.kind(metric) else "not a metric"
        raise UsageError(f"{what}: {metric!r}", where="METRIC", hint="`peft-harness history show` names them; or `*`")


def _night(history: History, night: str) -> None:
    nights = [n.night for n in history.nights]
    if night not in nights:
        hint = f"the last ones are {', '.join(nights[-3:])}"
        raise UsageError(f"no night {night!r} in this history", where="--night", hint=hint)


def known(cells: Iterable[str], start: str) -> str:
    """Return the one cell_id that begins so, or `*` for itself. Raises UsageError for none and for several."""
    found = [EVERY] if start == EVERY else [cell_id for cell_id in cells if start and cell_id.startswith(start)]
    if len(found) == 1:
        return found[0]
    what = f"{start!r} fits {len(found)} Cells" if found else f"no Cell {start!r} in this history"
    raise UsageError(what, where="CELL", hint="give (more of) its id, as `peft-harness history show` prints it; or `*`")


def who(author: str | None) -> str:
    """Return who decides: the name, or else git's user. Raises UsageError if that is nobody."""
    if author and author.strip():
        return author.strip()
    if shutil.which("git") is not None:
        said = []
        for key in ("user.name", "user.email"):
            try:
                done = subprocess.run(
                    ["git", "config", key], capture_output=True, text=True, check=False, timeout=30
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired):
                break
            said.append(done.stdout.strip())
        if said and said[0]:
            return said[0] + (f" <{said[1]}>" if len(said) > 1 and said[1] else "")
    raise UsageError(
        "who decides this? git knows no user.name here", where="--author", hint='name yourself: --author "..."'
    )


def _append(folder: Path, name: str, line: Line) -> None:
    """Add a line by writing the file anew; what is broken in it stays as it is, for its owner to mend."""
    with night_files.held(folder):
        path = folder / name
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"cannot read: {error}", where=str(path), hint="restore it from git") from error
        night_files.append_line(path, before, line)
