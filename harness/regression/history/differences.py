"""What lies between two nights: runs, code, libraries; and the command that tries a candidate again by pairs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from harness import resources
from harness.analysis import tracked_metrics
from harness.regression.history.changes import Change
from harness.regression.history.decisions import EVERY, NEAR, start
from harness.regression.history.night_files import History, Line, Night


@dataclass(frozen=True)
class Between:
    """From the last night of the old level to the first of the new one. revisions: of git, empty where not recorded.

    software: `name old -> new` of every library that changed. confirm: a command, or empty: it compares nights a little
    further apart, as the place of a change may be off. paired: the revisions of these; libraries: what else changed between
    them. because: why there is no command, or what to know of it.
    """

    old_night: str
    new_night: str
    code: tuple[str, str]
    revisions: tuple[str, str]
    software: tuple[str, ...]
    confirm: str
    because: str = ""
    paired: tuple[str, str] = ("", "")
    libraries: tuple[str, ...] = ()


def between(history: History, change: Change) -> Between:
    """Compare the last pass of a Cell (`*`: of any) before a change with its first pass after it, at the change's place."""
    old, new = (history.nights[i] for i in change.nights)
    a, b = _passes(old, change)[-1], _passes(new, change)[0]
    code = (str(a.get("code_version", "")), str(b.get("code_version", "")))
    outer = _outer(history, change)
    c, d = _passes(outer[0], change)[-1], _passes(outer[1], change)[0]
    paired, libraries = (_revision(c), _revision(d)), _software(c, d)
    notes = ["a night ran changes that are in no commit"] if _dirty(c, d) else []
    suite, strange = _suite(d)
    words = ["--suite", shlex.quote(suite)]
    if change.cell != EVERY:
        words += ["--only", change.cell]
    place = new.places[change.on]
    if (device := str(place.get("device", "")).partition(":")[0]) in ("cpu", "cuda"):
        words += ["--device", device]
    # A change may show only where as many threads work together as did that night.
    cores = ["--cores", str(place["threads"])] if device == "cpu" and str(place.get("threads")).isdecimal() else []
    confirm = ""
    if change.sure:
        notes = ["counted: there is nothing to confirm"]
    elif not _by_pairs(change.metric):
        again = " ".join(["peft-harness run", *words[1:]])  # to `run` the suite is an argument
        why = f"pairs do not measure {change.metric}; a rerun of the suite by both does: `{again}`"
        notes = [why, *strange, *notes]
    elif _searches(history, change.cell):
        why = "it is a try of a search for a learning rate, which pairs leave out; a rerun of the suite tells"
        notes = [why, *notes]
    elif not all(paired):
        notes = ["a night was not run from a git checkout: no revisions to build the pairs from"]
    elif paired[0] == paired[1]:
        also = ", with changes that are in no commit" if notes else ""
        notes = [f"both nights ran the same revision{also}"]
    elif not notes and c.get("code_version") and c["code_version"] == d.get("code_version"):
        notes = ["both nights ran the same code of two revisions: look at libraries, driver and machine"]
    else:
        confirm = " ".join(["peft-harness gate --pairs", *(revision[:12] for revision in paired), *words, *cores])
        today = [f"pairs run both with today's libraries, and {', '.join(libraries)} since"] if libraries else []
        notes = [*strange, *today, *notes]
    return Between(
        old.night, new.night, code, (_revision(a), _revision(b)), _software(a, b), confirm, "; ".join(notes), paired,
        libraries,
    )  # fmt: skip


def _by_pairs(metric: str) -> bool:
    """Say whether pairs of runs judge it: the times that code can change, and peaks."""
    kind = tracked_metrics.kind(metric)
    return kind == "peak" or (kind == "timed" and not metric.startswith(tracked_metrics.SENTINEL))


def _outer(history: History, change: Change) -> tuple[Night, Night]:
    """Return the nights to compare: NEAR further from the change on either side, as far as its Cell has them there.

    Levels have more nights than that; a young one ends with its last.
    """
    begin = start(history.resets, change.cell, change.metric)
    there = [
        i for i, night in enumerate(history.nights)
        if night.night >= begin and any(change.cell in (EVERY, row["cell"]) and row["on"] == change.on for row in night.rows)
    ]  # fmt: skip
    before, after = there.index(change.nights[0]), there.index(change.nights[1])
    last = after if change.young else min(after + NEAR, len(there) - 1)
    return history.nights[there[max(0, before - NEAR)]], history.nights[there[last]]


def _suite(run: Line) -> tuple[str, list[str]]:
    """Return the name of a run's suite, and what to know of one that does not come with the harness."""
    name = str(run.get("suite", ""))
    if re.fullmatch(r"[\w.-]+", name) and (resources.folder("suites") / f"{name}.yaml").is_file():
        return name, []
    return name, ["the suite is not one of the harness's own: put the path of its file in place of its name"]


def _searches(history: History, cell: str) -> bool:
    """Say whether a Cell only tries a learning rate: these alone have items that they leave out."""
    evaluation = history.cells.get(cell, {}).get("evaluation")
    return isinstance(evaluation, dict) and bool(evaluation.get("skip"))


def _passes(night: Night, change: Change) -> list[Line]:
    runs = {row["run"] for row in night.rows if change.cell in (EVERY, row["cell"]) and row["on"] == change.on}
    return sorted((night.runs[run] for run in runs), key=lambda run: (str(run.get("started", "")), run["run"]))


def _revision(run: Line) -> str:
    """Return the commit; nothing for what is none: it becomes part of a command that somebody pastes."""
    sha = str(run.get("git_sha", ""))
    return sha if re.fullmatch("[0-9a-f]{7,64}", sha) else ""


def _dirty(a: Line, b: Line) -> bool:
    return bool(a.get("git_dirty") or b.get("git_dirty"))


def _software(a: Line, b: Line) -> tuple[str, ...]:
    left, right = _libraries(a), _libraries(b)
    names = sorted(name for name in {**left, **right} if left.get(name) != right.get(name))
    return tuple(f"{name} {left.get(name, 'none')} -> {right.get(name, 'none')}" for name in names)


def _libraries(run: Line) -> Line:
    found = run.get("software")
    return found if isinstance(found, dict) else {}
