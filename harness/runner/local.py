"""The local executor: Cells one after the other, each in a process of its own, watched, timed out, killed as a tree."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import store
from harness.errors import StoreError
from harness.records import Environment, Failure, Record, Status
from harness.runner.progress import Progress
from harness.runner.work import Work

_LAST_LINES = 15
_GRACE_S = 5.0


def attempt(
    work: Work, folder: store.RunFolder, environment: Environment, timeout: float, progress: Progress
) -> Record:
    """Run one attempt in a fresh process and return its Record; writes one itself if the worker could not."""
    cell_id = work.cell.cell_id
    started, begun = store.now(), time.monotonic()
    log = folder.log_path(cell_id, work.attempt)
    died = _run(work, log, timeout, progress)
    seconds = time.monotonic() - begun
    path = folder.record_path(cell_id, work.attempt)
    if path.exists():
        return store.read_record(path)
    status, kind, because = died
    record = Record(
        run=work.run,
        cell_id=cell_id,
        attempt=work.attempt,
        status=status,
        because=because,
        cell=work.cell,
        environment=environment,
        device=work.device,
        assets=work.assets,
        started=started,
        duration_s=seconds,
        failure=Failure(kind=kind, message=_tail(log), phase=progress.phase, last_peak_B=progress.peak_B),
    )
    folder.write_record(record)
    return record


def _run(work: Work, log: Path, timeout: float, progress: Progress) -> tuple[Status, str, str]:
    """Run the worker to its end; say how it died, for the case that it leaves no Record."""
    events_in, events_out = os.pipe()
    watched_in, watched_out = os.pipe()
    killed = _oom_kills()
    with _closing(events_in, watched_out):
        with _closing(events_out, watched_in):  # the worker has its own copies; with ours open no pipe would ever end
            worker = _start(work, log, events_out, watched_in)
        try:
            late = not _follow(events_in, worker, time.monotonic() + timeout, progress)
            if not late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(_GRACE_S)
        finally:
            _kill_tree(worker)
    if late:
        return Status.TIMEOUT, "timeout", f"not done after {timeout:g} s, in phase {progress.phase}"
    code = worker.returncode
    if code < 0:
        name = signal.Signals(-code).name
        if code == -signal.SIGKILL and _oom_kills() > killed:
            return Status.OOM, name, "the kernel killed the worker: the host's memory ran out"
        return Status.LOST, name, f"the worker was killed by {name} in phase {progress.phase}"
    return Status.LOST, f"exit {code}", f"the worker ended with exit code {code} and left no Record; see its log"


def _start(work: Work, log: Path, events: int, watched: int) -> subprocess.Popen[Any]:
    """Start the worker in a session of its own; raises StoreError."""
    # -P: a file in the user's folder must not stand in for a library's module of the same name.
    command = [sys.executable, "-P", "-m", "harness.runner.worker", str(events), str(watched)]
    try:
        # The file has no name, so that even a killed runner leaves none behind.
        with tempfile.TemporaryFile() as spec, log.open("wb") as output:
            spec.write(work.model_dump_json(by_alias=True).encode())
            spec.seek(0)
            return subprocess.Popen(
                command,
                stdin=spec,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(events, watched),
                start_new_session=True,
                env=_worker_environment(),
            )
    except OSError as error:
        raise StoreError(
            f"cannot start a worker: {error.strerror or error}",
            where=str(error.filename or log),
            mend="free some space or memory, then `peft-harness run SUITE --resume RUN`; what was finished is kept",
        ) from error


def _follow(events: int, worker: subprocess.Popen[Any], deadline: float, progress: Progress) -> bool:
    """Pass the worker's events on until it ends; return False if the deadline came first."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if not selector.select(min(left, 1.0)):
                progress.tick()
                if worker.poll() is not None:  # a child of it may still hold the pipe open
                    return True
                continue
            chunk = os.read(events, 65536)
            if not chunk:
                return True
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):  # a line torn by a crash tells nothing
                    progress.event(json.loads(line))


def _kill_tree(worker: subprocess.Popen[Any]) -> None:
    """Kill the worker's whole process group, also the children of a worker that has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _worker_environment() -> dict[str, str]:
    """Return the worker's environment: all it needs is on disk already, so it never asks the network."""
    always = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # the order of a plug-in's sets is part of a run that is to be repeated bit by bit
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return os.environ | always


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for memory, in this cgroup or since boot; 0 where it cannot tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
    return ""


@contextlib.contextmanager
def _closing(*descriptors: int) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
