"""Which elements of an array have ended. submitit is not asked: to it PREEMPTED goes on and SUSPENDED has ended."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from typing import Any

GONE = "GONE"
_UNKNOWN_S = 600.0  # Slurm's accounting may be as late as this
_ASK_S = 30.0
# With --no-requeue a job that was preempted is never started again.
_FINAL = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip


class States:
    """What became of submitit's jobs. here: they are processes of this machine."""

    def __init__(self, *, here: bool) -> None:
        self._here = here
        self._unknown: dict[str, float] = {}

    def ended(self, jobs: Sequence[Any]) -> list[tuple[Any, str]]:
        """Return those that have ended, each with Slurm's word for it: one question to Slurm answers for all."""
        if self._here:
            return [(job, str(job.state)) for job in jobs if job.done()]
        if jobs:
            jobs[0].watcher.clear()  # or what it once took for ended would never be asked after again
        return [(job, state) for job in jobs if (state := self._final(job))]

    def _final(self, job: Any) -> str:
        words = str(job.state).split()  # of `CANCELLED by 1000` the first
        state = words[0].upper() if words else "UNKNOWN"
        if state in _FINAL:
            return state
        if job.paths.result_pickle.exists():  # accounting is behind
            return "COMPLETED"
        if state != "UNKNOWN":
            self._unknown.pop(job.job_id, None)
            return ""
        since = self._unknown.setdefault(job.job_id, time.monotonic())
        return GONE if time.monotonic() - since >= _UNKNOWN_S and _forgotten(job.job_id) else ""


def _forgotten(job_id: str) -> bool:
    """Whether the queue does not know it either. A cluster without accounting knows its jobs only there."""
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", job_id], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False  # no answer is no word for its end
    return not asked.stdout.strip() if asked.returncode == 0 else "Invalid job id" in asked.stderr
