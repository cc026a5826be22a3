"""Start subprocesses, read their output, and end them together with all their children. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO, Self

ANSWER = "answer: "
"""Prefix of a line on stdout that holds a worker's result. Libraries print lines without it."""

_OUTPUT_LINES = 1000
_CHUNK_B = 1 << 16
_FULL_DISK = ("No space left on device", "Disk quota exceeded", "os error 28")


class Pipe:
    """The reading end of a pipe."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_closed = False
        """True once no process holds the writing end, and all data have been read."""
        self._rest = b""

    def readable(self, timeout: float = 0.0) -> bool:
        """Wait up to `timeout` seconds for data or for the end of the pipe, and return whether `read` would not block."""
        return bool(select.select([self.descriptor], [], [], max(0.0, timeout))[0])

    def read(self) -> bytes:
        """Wait for bytes, and return them. At the end of the pipe, return b""."""
        chunk = os.read(self.descriptor, _CHUNK_B)
        self.is_closed = not chunk
        return chunk

    def lines(self) -> list[bytes]:
        """Wait for bytes, and return the lines that are then complete. There may be none."""
        *lines, self._rest = (self._rest + self.read()).split(b"\n")
        return lines


class LastLines:
    """A reader of pipes that keeps the last lines in memory.

    On a full disk, a file would lack the line that reports the full disk. A thread reads each pipe, because a process with
    a full pipe would wait forever for a reader.
    """

    def __init__(self, *pipes: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=_OUTPUT_LINES)
        self._readers = [threading.Thread(target=self._read, args=(pipe,), daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    @property
    def text(self) -> str:
        """The lines so far."""
        return "".join(self._lines)

    def join(self) -> None:
        """Wait up to two seconds for the end of each pipe, which comes when the last process that holds it has ended."""
        for reader in self._readers:
            reader.join(timeout=2)

    def _read(self, pipe: IO[bytes]) -> None:
        with io.TextIOWrapper(pipe, encoding="utf-8", errors="replace") as lines:  # type: ignore[type-var]
            self._lines.extend(lines)


class Subprocess:
    """A process in a separate session: Ctrl-C does not reach it, and `close` kills it together with its children.

    The end of a `with` block calls `close`. `output` has the last lines of stdout and stderr if these are `PIPE`.

    events, lifeline: whether to open a pipe of this name. For each pipe, the process gets the descriptor of its end as
    a decimal argument before `arguments`. The constructor raises OSError if the process cannot be started.
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
            # The child has copies of its ends of the pipes. This process must close its own copies, or no pipe would end.
            if events:
                reading, writing = os.pipe()
                ours.callback(os.close, reading)
                theirs.callback(os.close, writing)
                self.events = Pipe(reading)
                """The pipe with the events of the process. This attribute exists only if `events` is true."""
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
        self._is_reaped = False
        """True if the process group was killed and the exit code was read."""
        self._lines = LastLines(*(pipe for pipe in (self._process.stdout, self._process.stderr) if pipe is not None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def output(self) -> str:
        """The last lines of the captured output. All output has been read once the process is closed."""
        return self._lines.text

    @property
    def reports_full_disk(self) -> bool:
        """True if the captured output mentions a full disk or an exceeded disk quota."""
        return any(sign in self.output for sign in _FULL_DISK)

    @property
    def exit_code(self) -> int | None:
        """The exit code. Negative if a signal ended the process; None while the process runs."""
        return self._process.poll()

    @property
    def is_over(self) -> bool:
        """True if all events have been read.

        Either the pipe is closed, or the process has ended and the pipe is empty. The first condition alone is not
        enough, because a child of the process may hold the pipe open forever.
        """
        return self.events.is_closed or (self.exit_code is not None and not self.events.readable())

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code. If the process still runs after `timeout` seconds, return None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout)
        return None

    def terminate(self, grace: float) -> None:
        """Send SIGTERM, and wait up to `grace` seconds for the end of the process."""
        self._process.terminate()
        self.wait(grace)

    def kill_group(self) -> None:
        """Kill the process group: the process and its children, even if the process itself has ended."""
        if self._is_reaped:  # the id may belong to other processes by now
            return
        # The group may have ended. For a group of zombies macOS raises PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the whole process group, and close the pipes. A second call does nothing."""
        self.kill_group()
        self._process.wait()
        self._is_reaped = True
        self._lines.join()
        self._ours.close()


def python(
    arguments: Sequence[str], environment: Mapping[str, str], after: Sequence[str] = (), *, lifeline: bool = False
) -> Subprocess:
    """Start this Python with `arguments` in a subprocess whose output is captured, and return the subprocess.

    environment: variables in addition to those of this process. after: arguments that follow the lifeline's descriptor.
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
    """Start and return a subprocess that runs `module`. The module's first argument is the lifeline's descriptor."""
    return python(module_arguments(module), environment, arguments, lifeline=True)


def module_arguments(module: str) -> list[str]:
    """Return the arguments that make Python run a module."""
    # -P: a file in the user's folder must not replace a library's module of the same name.
    return ["-P", "-m", module]


def signal_name(exit_code: int) -> str:
    """Return the name of the signal that ended a process, or an empty string for a normal exit."""
    if exit_code >= 0:
        return ""
    with contextlib.suppress(ValueError):
        return signal.Signals(-exit_code).name
    return f"signal {-exit_code}"


def run_in_fork(function: Callable[[], bytes], timeout: float) -> bytes | None:
    """Run `function` in a fork of this process, and return the result.

    If the fork dies, return b"". If the fork takes more than `timeout` seconds, return None. The fork stays in the
    process group of this process, so that both are killed together. Output of the fork is discarded.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(function, sender))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it warns of threads, but the child waits for none
        child.start()
    sender.close()
    try:
        return receiver.recv_bytes() if receiver.poll(timeout) else None
    except (EOFError, OSError):
        return b""
    finally:
        receiver.close()
        child.kill()
        child.join()


def _send_result(function: Callable[[], bytes], sender: Connection) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    sender.send_bytes(function())
