"""What a command costs in CPU time, whatever else the machine does."""

import resource
import subprocess
import sys
from pathlib import Path

RUNS = 3
"""A neighbour on the same core can only add to a process's CPU time (shared caches, hyperthreads): the least of several
runs is the nearest to what the command itself needs."""


def least(code: str, *arguments: str, cwd: Path | None = None) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run Python code RUNS times; return the least CPU time of one run in seconds, and what the last run said."""
    spent = []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent), done
