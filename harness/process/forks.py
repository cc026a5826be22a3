"""Run functions in forks of this process, several at a time, each with limits of time and memory. Not on Windows."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Generic, NoReturn, TypeVar

_T = TypeVar("_T")
_WALL_FACTOR = 10
"""Limit of wall time divided by the limit of CPU time. Wall time limits a fork that sleeps or waits for a lock."""


@dataclass(frozen=True)
class Limits:
    """Limits of a fork."""

    cpu_s: int
    """Seconds of CPU time."""
    memory_b: int
    """Bytes of address space in addition to what this process has now."""


@dataclass(frozen=True)
class ForkEnd(Generic[_T]):
    """End of one fork."""

    task: _T
    returned: Any
    """The JSON value that the function returned. None if the function returned no value."""
    died: str
    """Signal or exit code that ended the fork before the function returned, e.g. `SIGXCPU`. Empty if the function
    returned or raised an exception."""
    error: str
    """Last line of the traceback if the function raised an exception. Otherwise empty."""
    kind: str = ""
    """Name of the exception's type. Empty if there was none."""
    text: str = ""
    """Message of the exception."""
    traceback: str = ""
    """The whole traceback of the exception."""


def run(tasks: Iterable[_T], act: Callable[[_T], Any], jobs: int, limits: Limits) -> Iterator[ForkEnd[_T]]:
    """Call act(task) in a fork for every task, with at most `jobs` forks at a time. Yield the end of each fork.

    The fork that ends first is yielded first. `act` returns a JSON value, and what it prints is dropped. If the caller
    stops early, the running forks are killed.
    """
    waiting = iter(tasks)
    running: dict[int, tuple[_T, int, bytearray]] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                while len(running) < jobs:
                    try:
                        task = next(waiting)
                    except StopIteration:
                        break
                    reading, pid = _start(task, act, limits)
                    running[reading] = task, pid, bytearray()
                    selector.register(reading, selectors.EVENT_READ)
                if not running:
                    return
                for key, _ in selector.select():
                    task, pid, received = running[key.fd]
                    part = os.read(key.fd, 1 << 16)
                    received += part
                    if not part:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        del running[key.fd]
                        yield _end(task, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), bytes(received))
        finally:
            for reading, (_, pid, _) in running.items():
                os.close(reading)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _start(task: _T, act: Callable[[_T], Any], limits: Limits) -> tuple[int, int]:
    """Start a fork. Return the descriptor from which the value can be read, and the fork's process id."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        os.close(reading)
        with open(writing, "w") as pipe:  # noqa: PTH123
            _become(task, act, limits, pipe)
    os.close(writing)
    return reading, pid


def _become(task: _T, act: Callable[[_T], Any], limits: Limits, pipe: IO[str]) -> NoReturn:
    """Call `act` in the fork, write its result to the pipe, and end the fork."""
    code = 1
    try:
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nothing, stream)
            sys.stdout = sys.stderr = os.fdopen(nothing, "w")  # pytest, e.g., has streams of its own
            _limit(limits)
            text = json.dumps({"returned": act(task)})
        except BaseException as error:  # noqa: BLE001  # the parent reports it
            trace = traceback.format_exc()
            found = {"error": trace.strip().splitlines()[-1], "kind": type(error).__name__, "text": str(error)}
            text = json.dumps(found | {"traceback": trace})
        pipe.write(text)
        pipe.flush()
        code = 0
    finally:
        os._exit(code)


def _limit(limits: Limits) -> None:
    """Set the limits of this process. Ctrl-C and the limit of wall time end the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limits.cpu_s * _WALL_FACTOR)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ends_s = int(usage.ru_utime + usage.ru_stime) + limits.cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (ends_s, ends_s + 5))
    if sys.platform == "linux":
        with open("/proc/self/statm") as pages:  # noqa: PTH123
            size = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + limits.memory_b, resource.RLIM_INFINITY))


def _end(task: _T, code: int, received: bytes) -> ForkEnd[_T]:
    try:
        message = json.loads(received)
    except ValueError:
        return ForkEnd(task, None, signal.Signals(-code).name if code < 0 else f"exit code {code}", "")
    returned = message.pop("returned", None)
    return ForkEnd(task, returned, "", **({"error": ""} | message))
