"""Child processes that report in JSON lines through a pipe: watched, and ended with everything they started. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

_TOKEN = "PEFT_HARNESS_CHILD"  # noqa: S105
_START_S = 120.0  # until its first word a child imports torch, which is no fault of what it is to try
_GRACE_S = 5.0
_TICK_S = 0.5


class WorkerPool:
    """The child processes of one run of `check`, so that Ctrl-C can end them all."""

    def __init__(self) -> None:
        self.stopped = False
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End every child, and start no other."""
        with self._lock:
            self.stopped = True
            for process in self._alive:
                _kill_group(process)

    def events(self, module: str, words: Mapping[str, Any], patience: float) -> Iterator[dict[str, Any]]:
        """Run `python -m MODULE FD LINE WORDS` and yield what it reports, until it reports `done`.

        If it does not end well the last event is `died`, which says how: after a crash, after `patience` seconds without
        a word, or if it leaves a process behind. Nothing is left running; if this process is killed, the pipe LINE closes
        and the child ends too.
        """
        token = uuid.uuid4().hex
        reading, writing = os.pipe()
        held, line = os.pipe()
        with self._lock:
            process = None if self.stopped else _start(module, words, writing, held, token)
            if process is not None:
                self._alive.add(process)
        os.close(writing)
        os.close(held)
        how, watcher = "", 0
        try:
            for event in _lines(reading, process, patience) if process is not None else ():
                if event is None:
                    how = f"no result for {patience:g} s; killed"
                elif not isinstance(event, dict):
                    how = f"wrote {event!r} where only results are written; killed"
                    break
                elif "done" in event:
                    watcher = event["done"]
                    break
                else:
                    yield event
            if process is not None:
                how = how or _ended(process, watcher > 0)
                left = _left_behind(process, watcher, token) if not how else []
                how = how or (f"left a process behind: {', '.join(left)}; killed" if left else "")
        finally:
            os.close(reading)
            os.close(line)
            if process is not None:
                self._end(process, token)
        if how and not self.stopped:
            yield {"died": how}

    def _end(self, process: subprocess.Popen[bytes], token: str) -> None:
        _kill_group(process)
        process.wait()
        for other in _marked(token):  # those that have left the group
            with contextlib.suppress(psutil.Error):
                other.kill()
        with self._lock:
            self._alive.discard(process)


def _start(module: str, words: Mapping[str, Any], writing: int, held: int, token: str) -> subprocess.Popen[bytes]:
    # The tensors are tiny, and threads that wait for each other would slow down whatever runs beside this.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, _TOKEN: token}
    return subprocess.Popen(
        # -P: a file in the user's folder must not stand in for a library's module of the same name.
        [sys.executable, "-P", "-m", module, str(writing), str(held), json.dumps(words)],
        pass_fds=(writing, held), stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
    )  # fmt: skip


def _lines(reading: int, process: subprocess.Popen[bytes], patience: float) -> Iterator[Any]:
    """Yield the child's events until it is gone; None once it was silent for too long."""
    buffer, heard, allowed = b"", time.monotonic(), max(patience, _START_S)
    while True:
        gone = process.poll() is not None  # a child of it may hold the pipe open for ever
        if not select.select([reading], [], [], 0 if gone else min(_TICK_S, patience))[0]:
            if gone:
                return
            if time.monotonic() - heard >= allowed:
                yield None
                return
            continue
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            return
        heard, allowed = time.monotonic(), patience
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:  # a plug-in has found the pipe
                yield line[:40]


def _ended(process: subprocess.Popen[bytes], done: bool) -> str:
    """Say how a child ended that should be ending by now; nothing if it ended well."""
    try:
        code = process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        return f"the process did not end within {_GRACE_S:g} s of its last word; killed"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the process died of {signal.Signals(-code).name}"
    if done and code == 0:
        return ""
    return f"the process ended with exit code {code} before it was done; what it said is on stderr"


def _left_behind(process: subprocess.Popen[bytes], watcher: int, token: str) -> list[str]:
    """Name the processes that a child started and that do not end with it, though given a moment to."""
    deadline = time.monotonic() + _GRACE_S
    while names := [n for one in _marked(token) if one.pid not in (process.pid, watcher) for n in _name(one)]:
        if time.monotonic() > deadline:
            return names
        time.sleep(_TICK_S)
    return []


def _marked(token: str) -> Iterator[psutil.Process]:
    """Yield the living processes that inherited a child's environment."""
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if other.environ().get(_TOKEN) == token and other.status() != psutil.STATUS_ZOMBIE:
                yield other


def _name(process: psutil.Process) -> Iterator[str]:
    with contextlib.suppress(psutil.Error):
        yield f"{process.name()} ({process.pid})"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
