"""Find out from the kernel's log or counters whether the kernel killed a process because memory ran out."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_NAMED = re.compile(rb"Killed process (\d+)|oom-kill:[^\n]*,pid=(\d+)")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The namespace whose process ids the kernel's log uses. In a container, process ids differ from those in the log."""
_COUNTERS = ("memory.events", "memory.oom_control")
"""Names of the files of a cgroup that count processes killed for lack of memory, for cgroups v2 and for v1."""
_MACHINE = "vmstat"
"""Name of the file in /proc that counts processes killed for lack of memory on the whole machine."""


class KernelKills:
    """Watches for processes that the kernel kills because memory runs out. Earlier kills are ignored.

    log: the kernel's log. proc: the folder /proc. cgroups: the folder of the cgroups.
    """

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
        """Close the log."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def killed(self, pid: int, alone: bool) -> bool | None:
        """Return whether the kernel killed the process `pid` because memory ran out. If this is uncertain, return None.

        If the kernel's log is readable, it decides. Otherwise the counters of kills decide. alone: whether the runner
        had no other worker, so that a kill in the runner's cgroup must be the kill of this worker.
        """
        if self._log >= 0:
            return pid in set(self._named())
        own, machine = self._counts()
        if own is not None and self._own is not None:
            return (True if alone else None) if own > self._own else False
        return None if machine > self._machine else False

    def _named(self) -> Iterator[int]:
        """Yield the id of each process that the kernel killed, according to its log."""
        with contextlib.suppress(BlockingIOError):  # the end of the log
            while True:
                try:
                    lines = os.read(self._log, 65536)
                except BrokenPipeError:  # some lines were overwritten before they were read
                    continue
                if not lines:
                    return
                yield from (int(found[1] or found[2]) for found in _NAMED.finditer(lines))

    def _counts(self) -> tuple[int | None, int]:
        """Return the numbers of processes killed for lack of memory in this process's cgroup and on the whole machine.

        The first number is None if it is unknown.
        """
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
