"""Waiting for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

# For what takes seconds; a machine that is busy with other things takes longer.
PATIENCE_S = 120.0


def eventually(happens: Callable[[], bool], what: str) -> None:
    """Wait until `happens()`, and fail if it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline, f"in vain waited until {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether the process has ended, if only its parent has yet to hear of it; it may do so while it is looked at."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
