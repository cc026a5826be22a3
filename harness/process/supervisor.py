"""Start subprocesses, read what they write, and end them together with everything they started. No torch."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import IO, Self

ANSWER = "answer: "
"""Prefix of the lines in which a module of ours answers, among the lines that libraries print."""

_OUTPUT_LINES = 1000
_CHUNK_B = 1 << 16
_FULL_DISK = ("No space left on device", "Disk quota exceeded", "os error 28")


class Pipe:
    """The reading end of a pipe."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_closed = False
        """No process holds the writing end any more, and everything written has been read."""
        self._rest = b""

    def readable(self, timeout: float = 0.0) -> bool:
        """Wait up to `timeout` seconds for data or for the end of the pipe, and return whether `read` would not block."""
        return bool(select.select([self.descriptor], [], [], max(0.0, timeout))[0])

    def read(self) -> bytes:
        """Return the next bytes, none at the end of the pipe; blocks if there are none yet."""
        chunk = os.read(self.descriptor, _CHUNK_B)
        self.is_closed = not chunk
        return chunk

    def lines(self) -> list[bytes]:
        """Return the next complete lines; blocks if there are no bytes yet."""
        *lines, self._rest = (self._rest + self.read()).split(b"\n")
        return lines


class Subprocess:
    """A process in a session of its own: Ctrl-C does not reach it, and `close` kills it with everything it started.

    A context manager that closes it. stdout and stderr that are `PIPE` are captured in `output`.

    The command gets a descriptor for `events`, then one for `lifeline`, as decimal arguments before `arguments`. Raises
    OSError if the process cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        events: bool = False,
        lifeline: bool = False,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> None:
        inherited: list[int] = []
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            # The child has its own copies of its ends; with ours open no pipe would ever end.
            if events:
                reading, writing = os.pipe()
                ours.callback(os.close, reading)
                theirs.callback(os.close, writing)
                self.events = Pipe(reading)
                """The pipe on which it reports; only with `events`."""
                inherited.append(writing)
            if lifeline:
                reading, writing = os.pipe()
                ours.callback(os.close, writing)
                theirs.callback(os.close, reading)
                inherited.append(reading)
            self._process = subprocess.Popen(
                [*command, *map(str, inherited), *arguments], env=environment, stdin=stdin, stdout=stdout, stderr=stderr,
                pass_fds=inherited, start_new_session=True,
            )  # fmt: skip
            self._ours = ours.pop_all()
        self.pid = self._process.pid
        self._lines: deque[str] = deque(maxlen=_OUTPUT_LINES)
        # Into memory, not a file: on a full disk the file would lack just the line that says so. A thread, because a
        # child with a full pipe would wait for a reader for ever.
        self._listeners = [
            threading.Thread(target=self._listen, args=(pipe,), daemon=True)
            for pipe in (self._process.stdout, self._process.stderr)
            if pipe is not None
        ]
        for listener in self._listeners:
            listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def output(self) -> str:
        """The last lines of its captured output; complete once it is closed."""
        return "".join(self._lines)

    @property
    def reports_full_disk(self) -> bool:
        """Whether its captured output mentions a full disk or an exceeded quota."""
        return any(sign in self.output for sign in _FULL_DISK)

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        return self._process.poll()

    @property
    def is_over(self) -> bool:
        """Whether it has ended and all its events are read. A child of it may hold the pipe open for ever."""
        return self.events.is_closed or (self.exit_code is not None and not self.events.readable())

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code, or None if it still runs after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout)
        return None

    def terminate(self, grace: float) -> None:
        """Ask it to end by SIGTERM, and give it `grace` seconds for that."""
        self._process.terminate()
        self.wait(grace)

    def kill_group(self) -> None:
        """Kill its process group, also the children of a process that has ended."""
        # All may be gone by now; of a group of zombies macOS says PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill what still runs of it, and close its pipes. A second call does nothing."""
        self.kill_group()
        self._process.wait()
        for listener in self._listeners:
            listener.join(timeout=2)  # the pipe ends with the last process that holds it
        self._ours.close()

    def _listen(self, pipe: IO[bytes]) -> None:
        with io.TextIOWrapper(pipe, encoding="utf-8", errors="replace") as lines:  # type: ignore[type-var]
            self._lines.extend(lines)


def python(
    arguments: Sequence[str], environment: Mapping[str, str], after: Sequence[str] = (), *, lifeline: bool = False
) -> Subprocess:
    """Start this Python with `arguments`, capturing what it prints; `environment` is added to this process's own.

    after: arguments that follow the descriptor of the lifeline.
    """
    return Subprocess(
        [sys.executable, *arguments],
        after,
        environment={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **environment},
        lifeline=lifeline,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def python_module(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Subprocess:
    """Start a module of ours that ends when this process does: its first argument is for `die_with_parent`."""
    # -P: a file in the user's folder must not stand in for a library's module of the same name.
    return python(["-P", "-m", module], environment, arguments, lifeline=True)


def signal_name(exit_code: int) -> str:
    """Return the name of the signal that ended a process, or an empty string if none did."""
    if exit_code >= 0:
        return ""
    with contextlib.suppress(ValueError):
        return signal.Signals(-exit_code).name
    return f"signal {-exit_code}"


def run_in_fork(function: Callable[[], bytes], timeout: float) -> bytes | None:
    """Return what `function` returns in a fork of this process; nothing if the fork died, None after `timeout` seconds.

    The fork stays in this process's group, and ends with it. It prints nothing.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not wait for
        child = os.fork()
    if child == 0:
        os.close(reading)
        _be_fork(function, writing)
    os.close(writing)
    try:
        pipe, answer, until = Pipe(reading), b"", time.monotonic() + timeout
        while pipe.readable(until - time.monotonic()):
            answer += pipe.read()
            if pipe.is_closed:
                return answer
        return None
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # after its end this does nothing: it is not waited for yet
        os.waitpid(child, 0)


def _be_fork(function: Callable[[], bytes], writing: int) -> None:
    """Write what `function` returns, and end: nothing that the parent does at its end is done twice."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        with open(writing, "wb") as pipe:
            pipe.write(function())
    finally:
        os._exit(0)
