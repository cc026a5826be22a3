"""What lies between two nights: runs, code, libraries; and the command that tries a candidate again by pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.history.decisions import EVERY
from harness.history.files import Line, Night


@dataclass(frozen=True)
class Between:
    """From the last night of the old level to the first of the new one. revisions: of git, empty where not recorded.

    software: `name old -> new` of every library that changed. confirm: a command, or empty, and then `because` says why.
    """

    old_night: str
    new_night: str
    code: tuple[str, str]
    revisions: tuple[str, str]
    software: tuple[str, ...]
    confirm: str
    because: str = ""


def between(old: Night, new: Night, cell: str) -> Between:
    """Compare the last pass of a Cell (`*`: of any) on one night with its first pass on another."""
    a, b = _passes(old, cell)[-1], _passes(new, cell)[0]
    code = (str(a.get("code_version", "")), str(b.get("code_version", "")))
    revisions = (_revision(a), _revision(b))
    confirm, because = "", ""
    if not all(revisions):
        because = "a night was not run from a git checkout: no revisions to build the pairs from"
    elif revisions[0] == revisions[1]:
        because = "both nights ran the same revision" + (", with changes that are in no commit" if _dirty(a, b) else "")
    else:
        only = "" if cell == EVERY else f" --only {cell}"
        confirm = f"peft-harness gate --pairs {revisions[0][:12]} {revisions[1][:12]}{only}"
        because = "a night ran changes that are in no commit" if _dirty(a, b) else ""
    return Between(old.night, new.night, code, revisions, _software(a, b), confirm, because)


def _passes(night: Night, cell: str) -> list[Line]:
    runs = {row["run"] for row in night.rows if cell in (EVERY, row["cell"])}
    return sorted((night.runs[run] for run in runs), key=lambda run: (str(run.get("started", "")), run["run"]))


def _revision(run: Line) -> str:
    """Return the commit; nothing for what is none: it becomes part of a command that somebody pastes."""
    sha = str(run.get("git_sha", ""))
    return sha if re.fullmatch("[0-9a-f]{7,64}", sha) else ""


def _dirty(a: Line, b: Line) -> bool:
    return bool(a.get("git_dirty") or b.get("git_dirty"))


def _software(a: Line, b: Line) -> tuple[str, ...]:
    left, right = (run.get("software") if isinstance(run.get("software"), dict) else {} for run in (a, b))
    names = sorted(name for name in {**left, **right} if left.get(name) != right.get(name))
    return tuple(f"{name} {left.get(name, 'none')} -> {right.get(name, 'none')}" for name in names)
