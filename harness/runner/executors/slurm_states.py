"""Read the states of an array's elements. Submitit itself takes PREEMPTED for running and SUSPENDED for ended."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Sequence
from typing import Any

GONE = "GONE"
_UNKNOWN_S = 600.0  # Slurm's accounting may be that late
_TIMEOUT_S = 30.0
# With --no-requeue, a preempted job never restarts.
_FINAL = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip


class States:
    """The states of submitit's jobs. here: whether they are processes of this machine."""

    def __init__(self, *, here: bool) -> None:
        self._here = here
        self._unknown: dict[str, float] = {}

    def ended(self, jobs: Sequence[Any]) -> list[tuple[Any, str]]:
        """Return the jobs that have ended, each with Slurm's state. One query covers all."""
        if self._here:
            return [(job, str(job.state)) for job in jobs if job.done()]
        if jobs:
            jobs[0].watcher.clear()  # otherwise it never queries a job again that it once took for ended
        found = [(job, state) for job in jobs if (state := self._final(job))]
        late = [job for job in jobs if time.monotonic() - self._unknown.get(job.job_id, math.inf) >= _UNKNOWN_S]
        queue = _queue({job.job_id.split("_")[0] for job in late}) if late else None
        return found if queue is None else [*found, *((job, GONE) for job in late if job.job_id not in queue)]

    def _final(self, job: Any) -> str:
        parts = str(job.state).split()  # e.g. `CANCELLED by 1000`
        state = parts[0].upper() if parts else "UNKNOWN"
        if state not in _FINAL and job.paths.result_pickle.exists():  # accounting is behind
            state = "COMPLETED"
        if state == "UNKNOWN":
            self._unknown.setdefault(job.job_id, time.monotonic())
        else:
            self._unknown.pop(job.job_id, None)
        return state if state in _FINAL else ""


def _queue(arrays: set[str]) -> set[str] | None:
    """Return the elements that wait or run; None if there is no answer. For clusters without accounting."""
    command = ["squeue", "--noheader", "--array", "--format=%i", "--jobs", ",".join(sorted(arrays))]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode and "Invalid job id" not in found.stderr:  # which is the answer for a job that ended long ago
        return None
    return set(found.stdout.split())
