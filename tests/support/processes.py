"""Wait for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

# for events that take seconds; they take longer on a busy machine
PATIENCE_S = 120.0


def eventually(happens: Callable[[], bool], what: str) -> None:
    """Wait until `happens()` is true; fail after PATIENCE_S seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline, f"in vain waited until {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Return whether a process has ended. A zombie has ended too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
