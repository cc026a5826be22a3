"""Child processes that are listened to and never outlive the block that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

ANSWER = "answer: "
"""Begins the lines in which a module of ours answers, between what libraries say."""
_KEPT_LINES = 1000


@dataclass(frozen=True)
class Child:
    """A running process and the last lines of what it said, whole once its block has ended."""

    process: subprocess.Popen[str]
    lines: deque[str]

    @property
    def said(self) -> str:
        """The last lines, as one text."""
        return "".join(self.lines)

    @property
    def met_full_disk(self) -> bool:
        """Whether its words tell of a full disk or quota."""
        return any(sign in self.said for sign in ("No space left on device", "Disk quota exceeded", "os error 28"))


@contextmanager
def python(arguments: Sequence[str], environment: Mapping[str, str], keep: Sequence[int] = ()) -> Iterator[Child]:
    """Start this Python with `arguments`; at the end of the block kill it and whatever it started.

    `environment` is added to this process's own. keep: descriptors that it inherits.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        # Into memory, not a file: on a full disk the file would lack just the line that says so.
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **environment},
        # A session of its own, so that its children can be ended with it, and Ctrl-C is ours alone to handle.
        start_new_session=True,
        pass_fds=keep,
    )
    assert process.stdout is not None  # noqa: S101  # it is a PIPE
    child = Child(process, deque(maxlen=_KEPT_LINES))
    # A thread, for a child whose pipe is full would wait for a reader for ever.
    listener = threading.Thread(target=_listen, args=(process.stdout, child.lines), daemon=True)
    listener.start()
    try:
        yield child
    finally:
        # All may be gone by now; of a group of zombies macOS says PermissionError.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        listener.join(timeout=2)  # the pipe ends with the last process that holds it


@contextmanager
def tied(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[Child]:
    """Start a module of ours, which ends when this process does, whatever ends it.

    Its first argument is a descriptor for `harness.process.lifeline.hold`; then come `arguments`. Else as `python`.
    """
    watched, line = os.pipe()
    try:
        with python(["-P", "-m", module, str(watched), *arguments], environment, [watched]) as child:
            yield child
    finally:
        os.close(watched)
        os.close(line)


def _listen(pipe: IO[str], lines: deque[str]) -> None:
    with pipe:
        lines.extend(pipe)
