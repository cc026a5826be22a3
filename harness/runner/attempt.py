"""One attempt at a Cell: a process of its own, watched, timed out, killed as a tree. Every executor starts it so."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cell.job import Job
from harness.errors import StoreError
from harness.records import store
from harness.records.record import Environment, Failure, Record, Status
from harness.runner.oom_kills import KernelKills

# -P: a file in the user's folder must not stand in for a library's module of the same name.
WORKER = (sys.executable, "-P", "-m", "harness.runner.worker")

_LAST_LINES = 15
_GRACE_S = 5.0


@dataclass(frozen=True)
class RunContext:
    """What holds for every attempt of a run: where its Records go, the machine this process is on, seconds for each."""

    folder: store.RunFolder
    environment: Environment
    timeout: float


@dataclass(frozen=True)
class Ending:
    """How an attempt ended that left no Record. `kind` is a word for `Failure.kind`, `because` a sentence.

    peak_B: highest memory of the phases before `phase`, as far as the worker had told.
    """

    status: Status
    kind: str
    because: str
    phase: str = ""
    peak_B: int | None = None


class Attempt:
    """A worker at work. Raises StoreError if it cannot be started.

    `events` is a file descriptor to wait on. Call `read` when it can be read, and when `over`, `end`; or `kill`.
    """

    def __init__(self, work: Job, terms: RunContext, command: Sequence[str] = WORKER) -> None:
        self.work = work.model_copy(update={"launched": time.time()})
        self.phase = "start-up"
        self._peak_B: int | None = None
        self._terms = terms
        self._started, self._begun = store.now(), time.monotonic()
        self.deadline = self._begun + terms.timeout
        self._log = terms.folder.log_path(work.cell.cell_id, work.attempt)
        self._kernel = KernelKills()
        self._by_kernel: bool | None = False
        self._pending, self._ended = b"", False
        self.events, events_out = os.pipe()
        watched_in, self._lifeline = os.pipe()
        with _closing(events_out, watched_in):  # the worker has its own copies; with ours open no pipe would ever end
            try:
                self._worker = _start(self.work, self._log, command, events_out, watched_in)
            except BaseException:
                self._close()
                raise

    def read(self) -> Iterator[dict[str, Any]]:
        """Give the events that the worker has written; blocks if there are none."""
        chunk = os.read(self.events, 65536)
        self._ended = not chunk
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # a line torn by a crash tells nothing
                event = json.loads(line)
                if event.get("event") == "phase":
                    self.phase, self._peak_B = str(event["name"]), event.get("peak_B")
                yield event

    @property
    def over(self) -> bool:
        """Whether the worker has ended or its time is up."""
        if self._ended or time.monotonic() >= self.deadline:
            return True
        # A child of it may hold the pipe open; what it wrote itself is read first.
        return self._worker.poll() is not None and not select.select([self.events], [], [], 0)[0]

    def end(self) -> Record:
        """Kill what is left, and return the Record; writes one itself if the worker could not."""
        late = not self._ended and time.monotonic() >= self.deadline
        try:
            if not late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._worker.wait(_GRACE_S)
        finally:
            self.kill()
        return record_of(self.work, self._terms, self._ending(late), self._started, self._begun)

    def kill(self) -> None:
        """Kill the worker's whole process group, also the children of a worker that has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._worker.pid, signal.SIGKILL)
        if self._worker.wait() == -signal.SIGKILL:
            self._by_kernel = self._kernel.killed(self._worker.pid, alone=self.work.at_once == 1)
        self._close()

    def _close(self) -> None:
        self._kernel.close()
        os.close(self.events)
        os.close(self._lifeline)

    def _ending(self, late: bool) -> Ending:
        def ending(status: Status, kind: str, because: str) -> Ending:
            return Ending(status, kind, because, self.phase, self._peak_B)

        if late:
            return ending(Status.TIMEOUT, "timeout", f"not done after {self._terms.timeout:g} s, in phase {self.phase}")
        code = self._worker.returncode
        if code >= 0:
            because = f"the worker ended with exit code {code} and left no Record; see its log"
            return ending(Status.LOST, f"exit {code}", because)
        name = signal.Signals(-code).name
        because = f"the worker was killed by {name} in phase {self.phase}"
        if code == -signal.SIGKILL:
            if self._by_kernel:
                return ending(Status.OOM, name, "the kernel killed the worker: the host's memory ran out")
            if self._by_kernel is None:
                because += "; the kernel killed something for want of memory at that time"
        return ending(Status.LOST, name, because)


def record_of(work: Job, terms: RunContext, ending: Ending, started: str, begun: float) -> Record:
    """Return the Record of an attempt that is over; if its worker left none, write one that says how it ended.

    started: UTC; begun: of time.monotonic(), in this process.
    """
    path = terms.folder.record_path(work.cell.cell_id, work.attempt)
    if path.exists():
        return store.read_record(path)
    record = Record(
        run=work.run,
        cell_id=work.cell.cell_id,
        attempt=work.attempt,
        status=ending.status,
        because=ending.because,
        cell=work.cell,
        environment=terms.environment,
        device=work.device,
        assets=work.assets,
        started=started,
        duration_s=time.monotonic() - begun,
        failure=Failure(
            kind=ending.kind,
            message=_tail(terms.folder.log_path(work.cell.cell_id, work.attempt)),
            phase=ending.phase,
            last_peak_B=ending.peak_B,
        ),
        notes=work.notes,
    )
    try:
        terms.folder.write_record(record)
    except StoreError:
        if path.exists():  # by now: on a network file system its worker's may be seen late
            return store.read_record(path)
        raise
    return record


def _start(work: Job, log: Path, command: Sequence[str], events: int, watched: int) -> subprocess.Popen[Any]:
    """Start the worker in a session of its own; raises StoreError."""
    try:
        # The file has no name, so that even a killed runner leaves none behind.
        with tempfile.TemporaryFile() as spec, log.open("ab") as output:
            spec.write(work.model_dump_json(by_alias=True).encode())
            spec.seek(0)
            return subprocess.Popen(
                [*command, str(events), str(watched)],
                stdin=spec,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(events, watched),
                start_new_session=True,
                env=_worker_environment(work.threads, work.gpu),
            )
    except OSError as error:
        raise StoreError(
            f"cannot start a worker: {error.strerror or error}",
            where=str(error.filename or log),
            hint="free some space or memory, then `peft-harness run SUITE --resume RUN`; what was finished is kept",
        ) from error


def _worker_environment(threads: int | None = None, gpu: str = "") -> dict[str, str]:
    """Return the worker's environment: all it needs is on disk already, so it never asks the network."""
    always = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # the order of a plug-in's sets is part of a run that is to be repeated bit by bit
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # a number in CUDA_VISIBLE_DEVICES is then that of nvidia-smi
    }
    if threads is not None:  # a library that brings its own OpenMP does not hear what torch is told
        always["OMP_NUM_THREADS"] = str(threads)
    if gpu:
        always["CUDA_VISIBLE_DEVICES"] = gpu
    # An address inside the process that set it: torch's compiler would read it in ours.
    inherited = {key: value for key, value in os.environ.items() if key != "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
    return inherited | always


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
