"""Differences between two nights (runs, code, libraries), and the request that confirms a change by pairs of runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness import resources
from harness.analysis import tracked_metrics
from harness.regression.history.changes import Change
from harness.regression.history.decisions import EVERY, NEAR, last_reset
from harness.regression.history.night_files import History, Night, RunHeader
from harness.regression.pairs.request import PairsRequest


@dataclass(frozen=True)
class Between:
    """Differences from the last night of the old level to the first night of the new one."""

    old_night: str
    new_night: str
    code: tuple[str, str]
    """Code versions of the harness."""
    revisions: tuple[str, str]
    """Git revisions; empty if not recorded."""
    software: tuple[str, ...]
    """`name old -> new` for every library that changed."""
    request: PairsRequest | None
    """Compares the `paired` revisions; None if pairs cannot confirm the change."""
    because: str = ""
    """Reason why there is no request, or a remark on it."""
    paired: tuple[str, str] = ("", "")
    """Revisions of two nights with a larger distance, since the night of a change is uncertain."""
    libraries: tuple[str, ...] = ()
    """`name old -> new` for every library that changed between the `paired` nights."""

    @property
    def command(self) -> str:
        """The command that confirms the change, or an empty string."""
        return self.request.command() if self.request else ""

    def document(self) -> dict[str, Any]:
        """Return the differences as a JSON-compatible dict."""
        return {
            "old_night": self.old_night, "new_night": self.new_night, "code": self.code, "revisions": self.revisions,
            "software": self.software, "confirm": self.command, "because": self.because, "paired": self.paired,
            "libraries": self.libraries,
        }  # fmt: skip


def between(history: History, change: Change) -> Between:
    """Compare a Cell's last pass before a change with its first pass after it, at the same place (`*`: any Cell's)."""
    old, new = (history.nights[i] for i in change.nights)
    a, b = _passes(old, change)[-1], _passes(new, change)[0]
    code = (str(a.get("code_version", "")), str(b.get("code_version", "")))
    outer = _outer_nights(history, change)
    c, d = _passes(outer[0], change)[-1], _passes(outer[1], change)[0]
    paired, libraries = (_revision(c), _revision(d)), _changed_libraries(c, d)
    dirty = c.get("git_dirty") or d.get("git_dirty")
    notes = ["a night ran changes that are in no commit"] if dirty else []
    request = _request(change, d, new.places[change.place], paired)
    unknown_suite = [] if _ships(request.suite) else [
        "the suite is not one of the harness's own: put the path of its file in place of its name"
    ]  # fmt: skip
    confirmable = False
    if change.sure:
        notes = ["counted: there is nothing to confirm"]
    elif not _measured_by_pairs(change.metric):
        why = f"pairs do not measure {change.metric}; a rerun of the suite by both does: `{_rerun(request)}`"
        notes = [why, *unknown_suite, *notes]
    elif _is_search(history, change.cell):
        why = "it is a try of a search for a learning rate, which pairs leave out; a rerun of the suite tells"
        notes = [why, *notes]
    elif not all(paired):
        notes = ["a night was not run from a git checkout: no revisions to build the pairs from"]
    elif paired[0] == paired[1]:
        also = ", with changes that are in no commit" if notes else ""
        notes = [f"both nights ran the same revision{also}"]
    elif not notes and c.get("code_version") and c.get("code_version") == d.get("code_version"):
        notes = ["both nights ran the same code of two revisions: look at libraries, driver and machine"]
    else:
        confirmable = True
        today = [f"pairs run both with today's libraries, and {', '.join(libraries)} since"] if libraries else []
        notes = [*unknown_suite, *today, *notes]
    return Between(
        old.night, new.night, code, (_revision(a), _revision(b)), _changed_libraries(a, b),
        request if confirmable else None, "; ".join(notes), paired, libraries,
    )  # fmt: skip


def _request(change: Change, run: RunHeader, place: Mapping[str, str], paired: tuple[str, str]) -> PairsRequest:
    """Return the comparison of two revisions in the suite of a run, with the device and the threads of its place."""
    device, threads = str(place.get("device", "")).partition(":")[0], str(place.get("threads"))
    return PairsRequest(
        paired[0][:12],
        paired[1][:12],
        suite=str(run.get("suite", "")),
        only=None if change.cell == EVERY else change.cell,
        device=device if device in ("cpu", "cuda") else "auto",
        # A change may appear only with as many threads as in that night.
        cores=int(threads) if device == "cpu" and threads.isdecimal() else None,
    )


def _rerun(request: PairsRequest) -> str:
    """Return the command that runs the Cells of a request again."""
    words = ["peft-harness", "run", request.suite]
    words += ["--only", request.only] if request.only is not None else []
    words += ["--device", request.device] if request.device != "auto" else []
    return shlex.join(words)


def _measured_by_pairs(metric: str) -> bool:
    """Return whether pairs of runs judge a metric: times that code can change, and peaks."""
    kind = tracked_metrics.kind(metric)
    return kind == "peak" or (kind == "timed" and not metric.startswith(tracked_metrics.SENTINEL))


def _outer_nights(history: History, change: Change) -> tuple[Night, Night]:
    """Return the nights to compare: NEAR further from the change on either side, as far as its Cell has them there.

    Levels last longer than that; a young one ends with its last night.
    """
    begin = last_reset(history.resets, change.cell, change.metric)
    there = [
        i for i, night in enumerate(history.nights)
        if night.night >= begin
        and any(change.cell in (EVERY, row["cell"]) and row["on"] == change.place for row in night.rows)
    ]  # fmt: skip
    before, after = there.index(change.nights[0]), there.index(change.nights[1])
    last = after if change.young else min(after + NEAR, len(there) - 1)
    return history.nights[there[max(0, before - NEAR)]], history.nights[there[last]]


def _ships(suite: str) -> bool:
    """Return whether a suite comes with the harness."""
    return bool(re.fullmatch(r"[\w.-]+", suite)) and (resources.data_folder("suites") / f"{suite}.yaml").is_file()


def _is_search(history: History, cell: str) -> bool:
    """Return whether a Cell only tries a learning rate: only these Cells skip test items."""
    evaluation = history.cells.get(cell, {}).get("evaluation")
    return isinstance(evaluation, dict) and bool(evaluation.get("skip"))


def _passes(night: Night, change: Change) -> list[RunHeader]:
    runs = {row["run"] for row in night.rows if change.cell in (EVERY, row["cell"]) and row["on"] == change.place}
    return sorted((night.runs[run] for run in runs), key=lambda run: (str(run.get("started", "")), run["run"]))


def _revision(run: RunHeader) -> str:
    """Return the commit, or an empty string for a value that is no commit: it becomes part of a shell command."""
    sha = str(run.get("git_sha", ""))
    return sha if re.fullmatch("[0-9a-f]{7,64}", sha) else ""


def _changed_libraries(a: RunHeader, b: RunHeader) -> tuple[str, ...]:
    left, right = (dict(run["software"]) if isinstance(run.get("software"), dict) else {} for run in (a, b))
    names = sorted(name for name in {**left, **right} if left.get(name) != right.get(name))
    return tuple(f"{name} {left.get(name, 'none')} -> {right.get(name, 'none')}" for name in names)
