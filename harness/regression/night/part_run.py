"""Run one part (a command) of a nightly run in a separate process, within a time limit, and leave no process behind.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.process import lifeline
from harness.process.supervisor import Subprocess, signal_name
from harness.process.worker_pool import marked

_NOT_INHERITED = ("TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING")
"""Environment variables that a part does not inherit, since they make times of a GPU meaningless. `NightPart.variables`
may set them."""
GRACE_S = 20.0
"""Seconds that a command gets to save and print its measurements after its time is over."""
STDOUT = "stdout.json"
"""Name of the file that gets the stdout of a part."""
_MARK = "PEFT_HARNESS_NIGHT"
_TAIL_B = 4000
COMMAND = (sys.executable, "-P", "-m", "harness.cli")


@dataclass(frozen=True)
class CommandEnd:
    """End of a command: its exit code or signal, its times, and its last output."""

    code: int | None
    """Exit code of the command, negative for a signal; None if it had to be killed."""
    seconds: float
    cut: bool
    """True if the command was ended because its time was over, or because the nightly run was interrupted."""
    tail: str
    """Last lines that the command wrote to stderr."""
    cpu_s: float
    """Processor seconds of all processes of the command."""
    left: list[str]
    """Names of processes that the command left behind. They were killed."""
    interrupted: bool = False
    """True if the command was ended because a signal requested the end of the nightly run."""

    @property
    def died(self) -> str:
        """Clause that says how the command was killed, or which signal it died of. Empty if it exited by itself."""
        if self.code is None:
            return "killed: it did not end after its time was over"
        return f"died of {name}" if (name := signal_name(self.code)) else ""


def run(
    words: Sequence[str], variables: Mapping[str, str], folder: Path, limit_s: float, command: Sequence[str] = COMMAND
) -> CommandEnd:
    """Run peft-harness with the arguments `words`. Its stdout goes to `STDOUT`, its stderr to `log.txt` in `folder`.

    After `limit_s` seconds, or if a signal requests the end of this process, the command gets SIGTERM and then
    `GRACE_S` seconds to end. If this process is killed, the command is killed. Raises OSError if the command cannot be
    started.
    """
    token = uuid.uuid4().hex
    script = [sys.executable, "-I", "-S", lifeline.__file__]
    own = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    environment = {**own, **variables, _MARK: token}
    began, cpu_s = time.monotonic(), _cpu_s()
    log = folder / "log.txt"
    with (folder / STDOUT).open("wb") as stdout, log.open("wb") as stderr:
        child = Subprocess(
            script, [*command, *words], environment=environment, lifeline=True, stdout=stdout, stderr=stderr
        )
        try:
            code, interrupted = _wait(child, limit_s)
            cut = code is None
            if cut:
                child.terminate(GRACE_S)
                code = child.exit_code
        finally:
            child.close()
            left = _kill(token)
    return CommandEnd(code, time.monotonic() - began, cut, _tail(log), _cpu_s() - cpu_s, left, interrupted)


def _wait(child: Subprocess, limit_s: float) -> tuple[int | None, bool]:
    """Wait for a command. Return its exit code (None if it still runs), and whether a signal ended the wait."""
    try:
        return child.wait(max(0.0, limit_s)), False
    except KeyboardInterrupt:
        return None, True


def _cpu_s() -> float:
    """Return the processor seconds of the descendants of this process that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _kill(token: str) -> list[str]:
    """Kill the processes that a command has left behind, and return their names.

    The workers of a command are in other process groups, and end by themselves soon after the command. A process counts
    as left behind if it still runs two seconds later. token: value of the environment variable that marks the
    processes.
    """
    deadline = time.monotonic() + 2.0
    while (found := list(marked(_MARK, token))) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for one in found:
        with contextlib.suppress(psutil.Error):
            names.append(one.name())
            one.kill()
    psutil.wait_procs(found, timeout=5)
    return names


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL_B))
        return file.read().decode(errors="replace").strip()
