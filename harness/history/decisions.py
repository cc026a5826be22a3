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

from harness import store
from harness.analysis import watched
from harness.errors import StoreError, UsageError
from harness.history import files
from harness.history.files import Line

EVERY = "*"
NEAR = 2
"""A change of level is known to about so many nights; a decision holds for a change up to so many away."""
Verdict = Literal["regressed", "improved", "refuted"]


def reset(folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None) -> Line:
    """Accept the level of a series from `night` on, and write down who did and why; return the line.

    cell: the start of a cell_id, or `*`. metric: a name, or `*`. author: git's user if None. Raises UsageError for a Cell,
    metric or night that the history does not have, an empty reason, or nobody.
    """
    line = _line(folder, cell, metric, night, reason, author)
    _append(folder, files.RESETS, line)
    return line


def confirm(
    folder: Path, cell: str, metric: str, night: str, verdict: Verdict, evidence: str, author: str | None,
    revisions: Sequence[str] = (), seen: Mapping[str, Any] | None = None,
) -> Line:  # fmt: skip
    """Write down what pairs of runs said of a candidate; return the line.

    revisions: the two that were compared, where that is known. seen: what made one try it: `old_night`, `place`, `before`
    and `after`. Other arguments and errors as for `reset`.
    """
    line = _line(folder, cell, metric, night, evidence, author) | {"verdict": verdict}
    if revisions:
        line["revisions"] = list(revisions)
    if seen:
        line["seen"] = dict(seen)
    _append(folder, files.CONFIRMATIONS, line)
    return line


def concerns(line: Line, cell: str, metric: str) -> bool:
    """Say whether a decision is about a series; one about `latency_s` is about all that begin so."""
    family = metric.partition("/")[0]
    return line["cell"] in (cell, EVERY) and line["metric"] in (metric, family, EVERY)


def start(resets: Iterable[Line], cell: str, metric: str) -> str:
    """Return the night of the last reset of a series, or an empty string."""
    return max((line["night"] for line in resets if concerns(line, cell, metric)), default="")


def _line(folder: Path, cell: str, metric: str, night: str, reason: str, author: str | None) -> Line:
    history = files.read(folder)
    if not reason.strip():
        raise UsageError("an empty reason explains nothing", where="--reason", mend="say why, e.g. which change it is")
    nights = [n.night for n in history.nights]
    if night not in nights:
        shown = f"the last ones are {', '.join(nights[-3:])}" if nights else "add a run first"
        raise UsageError(f"no night {night!r} in this history", where="--night", mend=shown)
    there = {name for n in history.nights for row in n.rows for name in row.get("values", ())}
    if metric not in there | {name.partition("/")[0] for name in there} | {EVERY}:
        what = "no such metric in this history" if watched.kind(metric) else "not a metric"
        raise UsageError(f"{what}: {metric!r}", where="METRIC", mend="`peft-harness history show` names them; or `*`")
    return {
        "schema": files.SCHEMA, "cell": known(history.cells, cell), "metric": metric, "night": night,
        "reason": " ".join(reason.split()), "author": who(author),
        "made": store.now(),
    }  # fmt: skip


def known(cells: Iterable[str], start: str) -> str:
    """Return the one cell_id that begins so, or `*` for itself. Raises UsageError for none and for several."""
    found = [EVERY] if start == EVERY else [cell_id for cell_id in cells if start and cell_id.startswith(start)]
    if len(found) == 1:
        return found[0]
    what = f"{start!r} fits {len(found)} Cells" if found else f"no Cell {start!r} in this history"
    raise UsageError(what, where="CELL", mend="give (more of) its id, as `peft-harness history show` prints it; or `*`")


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
        "who decides this? git knows no user.name here", where="--author", mend='name yourself: --author "..."'
    )


def _append(folder: Path, name: str, line: Line) -> None:
    """Add a line by writing the file anew; what is broken in it stays as it is, for its owner to mend."""
    with files.held(folder):
        path = folder / name
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"cannot read: {error}", where=str(path), mend="restore it from git") from error
        files.append_line(path, before, line)
