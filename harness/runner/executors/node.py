"""Run Cells on one machine of a cluster, one after the other."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.cell.job import Job
from harness.errors import HarnessError, StoreError
from harness.records import environment, store
from harness.records.record import Cell, Record, Status
from harness.runner.attempt import Ending, RunContext, record_of
from harness.runner.executors.local import Local
from harness.runner.worker_start import WORKER

VISIBLE_S = 60.0
"""Seconds to wait until a file that another machine wrote is visible on a network file system."""
_BEGUN = "begun on "


class RunTakenOverError(HarnessError):
    """Raised to end the Cells on this machine, because another process has ended or resumed the run."""


class MissingPathError(StoreError):
    """A machine cannot see a path that its Cells need."""

    node: str
    """Name of the machine."""


class _Listener:
    """A listener that reports nothing. Once the file `permit` is deleted, it raises RunTakenOverError to end the Cells."""

    def __init__(self, permit: Path | None) -> None:
        self._permit = permit

    def begin(self, cell: Cell) -> None:
        self.tick()

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        pass

    def tick(self) -> None:
        if self._permit is not None and not self._permit.exists():
            raise RunTakenOverError("the run was ended or resumed elsewhere", where=str(self._permit))


def run_jobs(
    specs: Sequence[str], timeout: float, command: Sequence[str] | None = None, permit: str | None = None
) -> None:
    """Run attempts on this machine, until all are done.

    specs: one Job per attempt, as JSON. Every attempt leaves its Record in the run's folder. Raises MissingPathError if
    this folder or an asset is missing. Raises RunTakenOverError once the file `permit` is deleted.
    """
    jobs = [Job.model_validate_json(spec) for spec in specs]
    folder, node = store.RunFolder(Path(jobs[0].folder)), os.uname().nodename
    for needed in {jobs[0].folder, *(path for job in jobs for path in _paths(job))}:
        if not Path(needed).exists():
            error = MissingPathError(
                f"is missing on {node}",
                where=needed,
                hint="keep the run (--out) and the cache (PEFT_HARNESS_CACHE) on a file system that every machine sees",
            )
            error.node = node
            raise error
    most = environment.threads()  # nodes differ: this node may have fewer threads than the share
    jobs = [job.model_copy(update={"threads": min(job.threads, most)}) if job.threads else job for job in jobs]
    context = RunContext(folder, environment.describe(most), timeout)
    listener = _Listener(Path(permit) if permit else None)
    with contextlib.closing(
        Local(command=command or WORKER).run(_each(jobs, folder, node), context, listener)
    ) as records:
        for _ in records:
            pass


def _paths(job: Job) -> Iterator[str]:
    yield from (asset.path for asset in (job.model, job.data, job.task.train) if asset)
    if job.task.file:
        yield job.task.file


def _each(jobs: Sequence[Job], folder: store.RunFolder, node: str) -> Iterator[Job]:
    """Yield each job, after writing the machine's name and the time into the job's log. `final_record` reads them there."""
    for job in jobs:
        with contextlib.suppress(OSError):  # the worker reports errors of the folder
            folder.log_path(job.cell.cell_id, job.attempt).write_text(f"{_BEGUN}{node} at {store.now()}\n")
        yield job


def final_record(job: Job, context: RunContext, ending: Ending, submitted: str, over: float) -> Record:
    """Return the Record of an attempt on another machine. If its worker has not written one, write one from `ending`.

    submitted: UTC time of the submission, used as the start if the attempt never started. over: value of
    time.monotonic() at the end of the attempt. The Record's duration excludes the time before a machine started the
    attempt. If no machine started it, the Record's status is `lost`.
    """
    started = _started(context.folder.log_path(job.cell.cell_id, job.attempt))
    if started is None:
        ending = Ending(Status.LOST, "never started", f"it never started: {ending.because}")
        return record_of(job, context, ending, submitted, time.monotonic())
    waited = time.monotonic() - over
    age = (datetime.now(UTC) - started).total_seconds() - waited
    begun = time.monotonic() - max(0.0, age)  # clocks of two machines may differ
    return record_of(job, context, ending, started.strftime("%Y-%m-%dT%H:%M:%SZ"), begun)


def _started(log: Path) -> datetime | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = log.read_text(errors="replace").splitlines()[0]
        if first.startswith(_BEGUN):
            return datetime.fromisoformat(first.rsplit(" ", 1)[1])
    return None
