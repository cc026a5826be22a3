"""One attempt at a Cell: start its worker, watch it, and kill it with all its children."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cell.job import Job
from harness.errors import StoreError
from harness.process.supervisor import signal_name
from harness.records import store
from harness.records.record import Environment, Failure, Record, Status
from harness.runner.oom_kills import KernelKills
from harness.runner.worker_start import WorkerStarter

_LAST_LINES = 15
_GRACE_S = 5.0


def _do_nothing() -> None:
    pass


@dataclass(frozen=True)
class RunContext:
    """Settings and callbacks that are the same for all attempts of a run."""

    folder: store.RunFolder
    environment: Environment
    """This machine and its software."""
    timeout: float
    """Maximum duration of an attempt, in seconds."""
    on_imports: Callable[[], object] = _do_nothing
    """Function that measures the time of imports. It is called when the process that forks an attempt has imported its
    modules, but only if no Cell runs."""


@dataclass(frozen=True)
class Ending:
    """Reason why an attempt ended. The runner writes it into a Record if the worker has not written one."""

    status: Status
    kind: str
    """Value for `Failure.kind` of the Record, e.g. `timeout`, `SIGKILL` or `exit 1`."""
    because: str
    """The cause in a sentence."""
    phase: str = ""
    peak_B: int | None = None
    """Peak memory up to the start of `phase`, in bytes. None if the worker has not reported it."""


class Attempt:
    """A worker that runs one Cell. The constructor raises StoreError if the worker cannot be started.

    Call `read` whenever the descriptor `events` is readable, and `end` once `is_over` is true. Call `kill` to give up.
    """

    def __init__(self, job: Job, context: RunContext, starter: WorkerStarter) -> None:
        self.job = job.model_copy(update={"launched": time.time()})
        self.phase = "start-up"
        self._peak_B: int | None = None
        self._context = context
        self._started, self._begun = store.now(), time.monotonic()
        self.deadline = self._begun + context.timeout
        self._oom_kills = KernelKills()
        self._by_kernel: bool | None = False
        try:
            self._worker = starter.start(self.job, context.folder.log_path(job.cell.cell_id, job.attempt))
        except BaseException:
            self._oom_kills.close()
            raise

    @property
    def events(self) -> int:
        """The file descriptor that becomes readable when the worker has written an event."""
        return self._worker.events.descriptor

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the events that the worker has written. If there are none yet, wait for one."""
        for line in self._worker.events.lines():
            with contextlib.suppress(ValueError):  # a line torn by a crash
                event = json.loads(line)
                if event.get("event") == "phase":
                    self.phase, self._peak_B = str(event["name"]), event.get("peak_B")
                yield event

    @property
    def is_over(self) -> bool:
        """True if the worker has ended or its time has run out."""
        return time.monotonic() >= self.deadline or self._worker.is_over

    def end(self) -> Record:
        """Kill the remaining processes and return the Record. If the worker has not written a Record, write one."""
        late = not self._worker.events.is_closed and time.monotonic() >= self.deadline
        try:
            if not late:
                self._worker.wait(_GRACE_S)
        finally:
            self.kill()
        return record_of(self.job, self._context, self._ending(late=late), self._started, self._begun)

    def kill(self) -> None:
        """Kill the worker and all its children, even if the worker itself has ended."""
        self._worker.close()
        if self._worker.exit_code == -signal.SIGKILL:
            self._by_kernel = self._oom_kills.killed(self._worker.pid, alone=self.job.at_once == 1)
        self._oom_kills.close()

    def _ending(self, *, late: bool) -> Ending:
        def ending(status: Status, kind: str, because: str) -> Ending:
            return Ending(status, kind, because, self.phase, self._peak_B)

        if late:
            because = f"not done after {self._context.timeout:g} s, in phase {self.phase}"
            return ending(Status.TIMEOUT, "timeout", because)
        code = self._worker.exit_code
        if not (name := signal_name(code or 0)):
            because = f"the worker ended with exit code {code} and left no Record; see its log"
            return ending(Status.LOST, f"exit {code}", because)
        because = f"the worker was killed by {name} in phase {self.phase}"
        if code == -signal.SIGKILL:
            if self._by_kernel:
                return ending(Status.OOM, name, "the kernel killed the worker: the host's memory ran out")
            if self._by_kernel is None:
                because += "; the kernel killed a process at that time because memory ran out"
        return ending(Status.LOST, name, because)


def record_of(job: Job, context: RunContext, ending: Ending, started: str, begun: float) -> Record:
    """Return the Record of an attempt that is over. If its worker has not written one, write one from `ending`.

    started: UTC time of the attempt's start. begun: time.monotonic() of this process at the attempt's start.
    """
    path = context.folder.record_path(job.cell.cell_id, job.attempt)
    if path.exists():
        return store.read_record(path)
    log = _tail(context.folder.log_path(job.cell.cell_id, job.attempt))
    record = job.record(
        status=ending.status,
        because=ending.because,
        environment=context.environment,
        started=started,
        duration_s=time.monotonic() - begun,
        failure=Failure(kind=ending.kind, message=log, phase=ending.phase, last_peak_B=ending.peak_B),
    )
    try:
        context.folder.write_record(record)
    except StoreError:
        if path.exists():  # on a network file system the worker's Record may have appeared after the first test
            return store.read_record(path)
        raise
    return record


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
    return ""
