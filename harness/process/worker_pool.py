"""Run workers that report events; watch them, and end them together with their children. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from harness.console import print_lines, print_note
from harness.process import fork_server
from harness.process.forked_workers import ForkedWorker, WorkerServer
from harness.process.supervisor import Subprocess, module_arguments, signal_name

_TOKEN = "PEFT_HARNESS_CHILD"  # noqa: S105
_KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Environment variables that make glibc keep up to 1 GiB of freed memory. By default, it returns the memory of a large
tensor to the kernel, which clears it for the next tensor. Some versions of glibc accept no larger MMAP threshold."""
_START_S = 120.0
"""Minimum time in seconds that a worker gets for its first event. It is long, because the worker imports torch
first."""
_GRACE_S = 20.0
"""Time limit in seconds for the end of a worker after its last event. On a busy machine, torch's shutdown takes seconds."""
_TICK_S = 0.5
_LAST_LINES = 50
"""Number of lines that are printed from the output of a worker that failed."""


_Worker = Subprocess | ForkedWorker


class WorkerPool:
    """The workers of one command. Ctrl-C ends all of them.

    python: interpreter of the workers. By default, it is the one that runs this process. imports: modules that most
    workers import. If forks are allowed, one process imports these modules, and each worker is a fork of it. Without
    `imports`, each worker is a new process.
    """

    def __init__(self, python: Path | None = None, imports: Sequence[str] = ()) -> None:
        self.stopped = False
        self._python = str(python or sys.executable)
        self._alive: set[_Worker] = set()
        self._lock = threading.Lock()
        self._imports = imports if fork_server.is_allowed() else ()
        self._server: WorkerServer | None = None
        self._server_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process that forks workers."""
        with self._server_lock:
            self._end_server()

    def stop(self) -> None:
        """Kill all workers, and let no more start."""
        with self._lock:
            self.stopped = True
            for worker in self._alive:
                worker.kill_group()
            if self._server is not None:
                self._server.kill()

    def events(self, module: str, task: Mapping[str, Any], patience: float) -> Iterator[dict[str, Any]]:
        """Run `module` in a worker, and yield the events that the worker reports before `done`.

        The command is `python -m MODULE EVENTS LIFELINE TASK`. If the worker fails, the last event is `died`, with the
        reason: a crash, `patience` seconds without an event, or a process that the worker leaves behind. The last lines
        that the worker wrote are then printed on stderr. No process remains, even if this process is killed.
        """
        token = uuid.uuid4().hex
        server = self._ready_server()
        with self._lock:
            worker = None if self.stopped else self._start(server, module, json.dumps(task), token)
            if worker is not None:
                self._alive.add(worker)
        if worker is None:
            return
        died, watcher = "", 0
        try:
            for event in _events(worker, patience):
                if event is None:
                    died = f"no result for {patience:g} s; killed"
                elif not isinstance(event, dict):
                    died = f"wrote {event!r} into the pipe for results; killed"
                    break
                elif "done" in event:
                    watcher = event["done"]
                    break
                else:
                    yield event
            died = died or _failure(worker, done=watcher > 0)
            left = _left_behind(worker, watcher, token) if not died else []
            died = died or (f"left a process behind: {', '.join(left)}; killed" if left else "")
        finally:
            self._end(worker, token)
        if died and not self.stopped:
            output = worker.output.rstrip("\n").split("\n") if worker.output else []
            print_lines([f"| {line}" for line in output[-_LAST_LINES:]], err=True)
            yield {"died": died}

    def start_server(self) -> None:
        """Start the process that forks workers, if forks are allowed. It imports while this process goes on."""
        with self._server_lock:
            if self._server is None and self._imports and not self.stopped:
                with contextlib.suppress(OSError):
                    environment = {**_KEEPS_MEMORY, **_environment()}
                    self._server = WorkerServer(self._python, self._imports, environment, _TOKEN)

    def _ready_server(self) -> WorkerServer | None:
        """Return the process that forks workers. Return None if there is none; then the workers must be new processes."""
        self.start_server()
        with self._server_lock:
            if self._server is not None and not (self._server.is_alive and self._server.is_ready()):
                self._end_server()
            return self._server

    def _end_server(self) -> None:
        self._imports = ()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _start(self, server: WorkerServer | None, module: str, task: str, token: str) -> _Worker:
        if server is not None:
            with contextlib.suppress(OSError):  # the server has just ended
                return server.start_worker(module, task, token)
        return Subprocess(
            [self._python, *module_arguments(module)], [task], environment=_environment() | {_TOKEN: token}, events=True,
            lifeline=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _end(self, worker: _Worker, token: str) -> None:
        worker.kill_group()
        for other in marked(
            _TOKEN, token
        ):  # processes outside the process group, which may hold the pipe of its output
            with contextlib.suppress(psutil.Error):
                other.kill()
        worker.close()
        with self._lock:
            self._alive.discard(worker)


def _environment() -> dict[str, str]:
    # The tensors are tiny, and threads that wait for each other would slow down other programs.
    return {"OMP_NUM_THREADS": "1", **os.environ}


class _Clock:
    """A clock that shows whether a process hangs.

    It counts CPU time while the process is runnable, and wall time while the process sleeps. So a process that waits for a
    processor on a busy machine does not seem to hang.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.restart()

    def restart(self) -> None:
        """Set the counted time to zero. If the process is runnable, it counts from the next `tick`."""
        self.seconds, self._wall = 0.0, time.monotonic()
        self._cpu: float | None = None  # reading it here, for every event, would take longer than the rest of the event

    def tick(self) -> None:
        """Add the time since the last call of `tick` or `restart` to the counted time."""
        wall, cpu = time.monotonic(), self._cpu_s()
        used = 0.0 if self._cpu is None else cpu - self._cpu
        self.seconds += used if self._runs() else wall - self._wall
        self._wall, self._cpu = wall, cpu

    def _cpu_s(self) -> float:
        try:
            times = psutil.Process(self._pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def _runs(self) -> bool:
        try:
            return psutil.Process(self._pid).status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        except psutil.Error:
            return False


def _events(worker: _Worker, patience: float) -> Iterator[Any]:
    """Yield the worker's events until the worker ends.

    If no event comes for `patience` seconds, as a `_Clock` counts them, yield None and end.
    """
    clock, allowed = _Clock(worker.pid), max(patience, _START_S)
    while not worker.is_over:
        if worker.events.readable(min(_TICK_S, patience)):
            allowed = patience
            for line in worker.events.lines():
                try:
                    yield json.loads(line)
                except ValueError:  # a plug-in has written to the pipe
                    yield line[:40]
            clock.restart()
            continue
        clock.tick()
        if clock.seconds >= allowed:
            yield None
            return


def _failure(worker: _Worker, *, done: bool) -> str:
    """Wait for the end of a worker after its last event, and describe its failure.

    If the worker has succeeded, return an empty string.
    """
    code = worker.wait(_GRACE_S)
    if code is None and done:  # the results are complete, and the end of a library may take long
        print_note(f"note: a process did not end within {_GRACE_S:g} s of its last result; killed")
        return ""
    if code is None:
        return f"the process did not end within {_GRACE_S:g} s of its last event; killed"
    if name := signal_name(code):
        return f"the process died of {name}"
    if done and code == 0:
        return ""
    return f"the process ended with exit code {code} before it was done; stderr has its output"


def _left_behind(worker: _Worker, watcher: int, token: str) -> list[str]:
    """Return the names of processes of a worker that still run `_GRACE_S` seconds after the worker's end."""
    deadline = time.monotonic() + _GRACE_S
    while names := [n for one in marked(_TOKEN, token) if one.pid not in (worker.pid, watcher) for n in _name(one)]:
        if time.monotonic() > deadline:
            return names
        time.sleep(_TICK_S)
    return []


def marked(variable: str, value: str) -> Iterator[psutil.Process]:
    """Yield the running processes that have this variable with this value in their environment.

    Child processes inherit the environment. So these are a process that was started with the variable, and its
    descendants.
    """
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if other.environ().get(variable) == value and other.status() != psutil.STATUS_ZOMBIE:
                yield other


def _name(process: psutil.Process) -> Iterator[str]:
    with contextlib.suppress(psutil.Error):
        yield f"{process.name()} ({process.pid})"
