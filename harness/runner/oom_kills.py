"""Whom the kernel killed because the host's memory ran out: by its log, or as far as its counters tell."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_NAMED = re.compile(rb"Killed process (\d+)|oom-kill:[^\n]*,pid=(\d+)")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's log has the process ids of this one: in a container the same number is another process."""
# Of a cgroup in v2 and in v1; and of the whole machine.
_COUNTERS = ("memory.events", "memory.oom_control")
_MACHINE = "vmstat"


class KernelKills:
    """What the kernel kills for want of memory from now on. log, proc, cgroups: where it tells; the last two are folders."""

    def __init__(
        self, log: Path = Path("/dev/kmsg"), proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
    ) -> None:
        self._proc, self._cgroups, self._log = proc, cgroups, -1
        self._own, self._machine = self._counts()
        with contextlib.suppress(OSError):
            if str((proc / "self/ns/pid").readlink()) == _FIRST_PID_NAMESPACE:
                self._log = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
                os.lseek(self._log, 0, os.SEEK_END)

    def close(self) -> None:
        """Give the log back."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def killed(self, pid: int, alone: bool) -> bool | None:
        """Return whether a process that was killed was killed by the kernel, for want of memory; None: perhaps.

        alone: nothing else of the runner's was at work, so what was killed in its cgroup can only be this one. Where the log
        can be read, it alone decides.
        """
        if self._log >= 0:
            return pid in set(self._named())
        own, machine = self._counts()
        if own is not None and self._own is not None:
            return (True if alone else None) if own > self._own else False
        return None if machine > self._machine else False

    def _named(self) -> Iterator[int]:
        """Yield the processes that the log says were killed."""
        with contextlib.suppress(BlockingIOError):  # as it ends
            while True:
                try:
                    lines = os.read(self._log, 65536)
                except BrokenPipeError:  # some were overwritten before they were read
                    continue
                if not lines:
                    return
                yield from (int(found[1] or found[2]) for found in _NAMED.finditer(lines))

    def _counts(self) -> tuple[int | None, int]:
        """Return how many processes were killed in this cgroup, None where it does not say, and on the machine."""
        own = next(
            (n for folder in self._folders() for name in _COUNTERS if (n := _count(folder / name)) is not None), None
        )
        return own, _count(self._proc / _MACHINE) or 0

    def _folders(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            for line in (self._proc / "self/cgroup").read_text().splitlines():
                number, controllers, path = line.split(":", 2)
                if number == "0" or "memory" in controllers.split(","):
                    yield (self._cgroups if number == "0" else self._cgroups / "memory") / path.lstrip("/")


def _count(file: Path) -> int | None:
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None
