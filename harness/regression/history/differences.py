"""Changes of code and libraries between two nightly runs, and the request to confirm a change by pairs of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness import resources
from harness.analysis import tracked_metrics
from harness.regression.history.changes import Change
from harness.regression.history.decisions import last_reset
from harness.regression.history.night_files import EVERY, NEAR, History, RunHeader
from harness.regression.pairs.request import PairsRequest


@dataclass(frozen=True)
class Between:
    """Differences between the last nightly run before a change of a result and the first nightly run after it."""

    code: tuple[str, str]
    """Code versions of the harness: (in the run before the change, in the run after the change)."""
    revisions: tuple[str, str]
    """Git revisions: (of the run before the change, of the run after the change). An unknown revision is an empty
    string."""
    software: tuple[str, ...]
    """Libraries that changed between the two runs, as `name old -> new`."""
    request: PairsRequest | None
    """Request to compare the revisions in `paired` by pairs of runs. None if such pairs cannot confirm the change."""
    because: str
    """Reason why `request` is None; otherwise remarks on the request."""
    paired: tuple[str, str]
    """Revisions to compare: (old, new). They may be some nights further apart than `revisions`, because the exact night
    of the change is uncertain."""
    libraries: tuple[str, ...]
    """Libraries that changed between the two revisions in `paired`, as `name old -> new`."""

    @property
    def command(self) -> str:
        """Shell command that confirms the change; empty if `request` is None."""
        return self.request.command() if self.request else ""

    def document(self) -> dict[str, Any]:
        """Return the differences for JSON."""
        fields = {key: value for key, value in vars(self).items() if key != "request"}
        return {**fields, "confirm": self.command}


def between(history: History, change: Change) -> Between:
    """Return what differs between a Cell's last run before a change and its first run after the change.

    Only runs at the place of the change count. If the Cell is `*`, runs of any Cell count.
    """
    old, new = _passes_around(history, change, change.old_night, change.night)
    code = (str(old.get("code_version", "")), str(new.get("code_version", "")))
    before, after = _passes_around(history, change, *_outer_nights(history, change))
    paired, libraries = (_revision(before), _revision(after)), _changed_libraries(before, after)
    request = _request(change, after, history.night(change.night).places[change.place], paired)
    remarks = [] if _ships(request.suite) else [
        "the suite is not part of the harness: replace its name in the command by the path of its file"
    ]  # fmt: skip
    reason = _why_no_pairs(history, change, before, after)
    if not reason and libraries:
        remarks.append(f"pairs run both revisions with today's libraries; {', '.join(libraries)} changed since then")
    elif reason and not _measured_by_pairs(change.metric):
        reason = f"{reason}: `{request.rerun_command()}`"
    elif reason:
        remarks = []  # the remarks are about a command, and there is none
    if not change.counted and _uncommitted(before, after):
        remarks.append("a night ran code with uncommitted changes")
    because = "; ".join([*filter(None, [reason]), *remarks])
    return Between(
        code, (_revision(old), _revision(new)), _changed_libraries(old, new), None if reason else request, because,
        paired, libraries,
    )  # fmt: skip


def _why_no_pairs(history: History, change: Change, before: RunHeader, after: RunHeader) -> str:
    """Return the reason why pairs of runs cannot confirm a change; empty if they can.

    before, after: headers of the two runs whose revisions would be compared.
    """
    revisions = (_revision(before), _revision(after))
    if change.counted:
        return "counted: there is nothing to confirm"
    if not _measured_by_pairs(change.metric):
        return f"pairs do not measure {change.metric}; rerun the suite with both revisions"
    if _is_search(history, change.cell):
        return "this Cell only tries a learning rate, and pairs leave such Cells out; rerun the suite"
    if not all(revisions):
        return "a night was not run from a git checkout: no revisions to build the pairs from"
    if revisions[0] == revisions[1]:
        return "both nights ran the same revision"
    same_code = before.get("code_version") and before.get("code_version") == after.get("code_version")
    if same_code and not _uncommitted(before, after):
        return "the revisions differ, but their code is the same: look at libraries, driver and machine"
    return ""


def _uncommitted(before: RunHeader, after: RunHeader) -> bool:
    """Return whether one of two runs had code with uncommitted changes."""
    return bool(before.get("git_dirty") or after.get("git_dirty"))


def _request(change: Change, run: RunHeader, place: Mapping[str, str], paired: tuple[str, str]) -> PairsRequest:
    """Return a request to compare two revisions with the suite of a run.

    place: facts that determine the device and the number of threads. paired: the two revisions.
    """
    device, threads = str(place.get("device", "")).partition(":")[0], str(place.get("threads"))
    # The change may appear only with the number of threads of that night.
    cores = int(threads) if device == "cpu" and threads.isdecimal() else None
    only = None if change.cell == EVERY else change.cell
    device = device if device in ("cpu", "cuda") else "auto"
    old, new = (revision[:12] for revision in paired)
    return PairsRequest(old, new, suite=str(run.get("suite", "")), only=only, device=device, cores=cores)


def _measured_by_pairs(metric: str) -> bool:
    """Return whether pairs of runs can judge a metric: a memory peak, or a time that depends on the code."""
    kind = tracked_metrics.kind(metric)
    return kind == "peak" or (kind == "timed" and not metric.startswith(tracked_metrics.SENTINEL))


def _outer_nights(history: History, change: Change) -> tuple[str, str]:
    """Return the two nights whose revisions are compared: before the change and after it.

    The exact night of a change is uncertain. So the first is up to NEAR nights before `change.old_night`, and the
    second up to NEAR nights after `change.night`. For a recent change, the second is `change.night` itself.
    """
    begin = last_reset(history.resets, change.cell, change.metric)
    nights = [
        night.night for night in history.nights
        if night.night >= begin and any(night.rows_of(change.cell, change.place))
    ]  # fmt: skip
    before, after = nights.index(change.old_night), nights.index(change.night)
    last = after if change.recent else min(after + NEAR, len(nights) - 1)
    return nights[max(0, before - NEAR)], nights[last]


def _ships(suite: str) -> bool:
    """Return whether a suite is installed with the harness. suite: a name or a path."""
    return bool(re.fullmatch(r"[\w.-]+", suite)) and (resources.data_folder("suites") / f"{suite}.yaml").is_file()


def _is_search(history: History, cell: str) -> bool:
    """Return whether a Cell only tries a learning rate. Such a Cell has an `evaluation.skip` above 0."""
    evaluation = history.cells.get(cell, {}).get("evaluation")
    return isinstance(evaluation, dict) and bool(evaluation.get("skip"))


def _passes_around(history: History, change: Change, old: str, new: str) -> tuple[RunHeader, RunHeader]:
    """Return the headers of the Cell's last run on the night `old`, and of its first run on the night `new`."""

    def passes(day: str) -> list[RunHeader]:
        night = history.night(day)
        runs = {row["run"] for row in night.rows_of(change.cell, change.place)}
        return sorted((night.runs[run] for run in runs), key=lambda run: (str(run.get("started", "")), run["run"]))

    return passes(old)[-1], passes(new)[0]


def _revision(run: RunHeader) -> str:
    """Return the commit of a run, or an empty string if the recorded value is not a commit.

    The check is necessary because a revision becomes part of a shell command.
    """
    sha = str(run.get("git_sha", ""))
    return sha if re.fullmatch("[0-9a-f]{7,64}", sha) else ""


def _changed_libraries(a: RunHeader, b: RunHeader) -> tuple[str, ...]:
    left, right = (dict(run["software"]) if isinstance(run.get("software"), dict) else {} for run in (a, b))
    names = sorted(name for name in {**left, **right} if left.get(name) != right.get(name))
    return tuple(f"{name} {left.get(name, 'none')} -> {right.get(name, 'none')}" for name in names)
