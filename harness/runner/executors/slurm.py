"""Run Cells as one Slurm job array, with the library submitit. An element of the array runs one Cell.

If Slurm limits the size of the array, an element runs several Cells. The array continues if the process that
submitted it ends. A resumed run uses the Records that the array has written, and ends the remaining elements. Slurm
never restarts an element (`--no-requeue`). Only `--resume` tries a Cell again, with a new attempt.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.cell.job import Job
from harness.errors import HarnessError, UsageError, import_extra
from harness.records import environment, store
from harness.records.record import Record, Status
from harness.runner.attempt import Ending, RunContext
from harness.runner.executors import node
from harness.runner.executors.executor import Device, ExecutorKind, ExecutorOption, Listener

LOCAL = "PEFT_HARNESS_SLURM"
"""Name of an environment variable. If its value is `local`, elements are processes on this machine."""
_EXCHANGE = "slurm"
"""Name of the folder for submitit's files. It is in the run's folder."""
_PERMIT = "wanted-"
"""Prefix of the name of a file next to submitit's files. The elements run only while this file exists."""
_MOST_ELEMENTS = 1000
"""Maximum number of elements. Slurm's own limit, MaxArraySize, is 1001 unless an administrator has changed it."""
_START_MIN = 5
"""Minutes that an element may run in addition to the time limits of its Cells."""
_LOOK_S = 0.5
_POLL_S = 15.0
_GRACE_S = 10.0
_CANCEL_S, _CANCEL_LOOK_S = 45.0, 1.0
"""Seconds to wait until cancelled elements have ended, and seconds between two queries. Slurm itself may take 30 s."""
GONE = "GONE"
_UNKNOWN_S = 600.0  # Slurm's accounting may be late by this time
_QUERY_TIMEOUT_S = 30.0
# With --no-requeue, a preempted job never restarts.
_FINAL = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip
_STATES = {"TIMEOUT": Status.TIMEOUT, "OUT_OF_MEMORY": Status.OOM}


class Element:
    """Code that an element of the job array runs. submitit calls this object on the machine of the element."""

    def __call__(self, specs: list[str], timeout: float, command: list[str] | None, permit: str) -> None:
        """Run the Cells of one element of the job array, one after the other.

        The element ignores Slurm's warning before a time limit. The runner learns the cause of the end from Slurm's
        accounting.
        """
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit would requeue this element
        node.run_jobs(specs, timeout, command, permit)


class Slurm:
    """The executor `slurm`.

    jobs: maximum number of Cells that run at a time; by default, as many as Slurm allows. options: options of sbatch,
    each KEY=VALUE. command: replaces the usual command of the worker.
    """

    is_remote = True

    def __init__(
        self, jobs: int | None = None, options: Sequence[str] = (), command: Sequence[str] | None = None
    ) -> None:
        self.jobs, self._command = jobs, list(command) if command else None
        self._options = dict(_option(text) for text in options)
        self._here = os.environ.get(LOCAL) == "local"
        """True if elements are processes on this machine, without Slurm."""
        self._submitit: Any = None

    def __enter__(self) -> Slurm:
        if not self._here and shutil.which("sbatch") is None:
            raise HarnessError(
                "there is no Slurm here: no `sbatch` on the PATH",
                where="--executor slurm",
                hint=f"run it on a login node, or with --executor local; {LOCAL}=local tries the same path on this machine",
            )
        self._submitit = import_extra("submitit", "--executor slurm")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def device(self, requested: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return `cuda` or `cpu`: the requested device, or for `auto`, `cuda` if the options of sbatch request GPUs."""
        has_gpu = "gpu" in self._options.get("gres", "") or any(key.startswith("gpus") for key in self._options)
        if requested == "cuda" and not has_gpu and not self._here:
            hint = "add --slurm gres=gpu:1, or --slurm gpus-per-node=1"
            raise UsageError("the options for Slurm request no GPU", where="--device cuda", hint=hint)
        return "cuda" if requested == "cuda" or (requested == "auto" and has_gpu) else "cpu"

    def run(self, queue: Iterator[Job], context: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Submit all jobs of `queue`, and yield the Record of each attempt when it ends."""
        exchange = context.folder.path.resolve() / _EXCHANGE
        exchange.mkdir(exist_ok=True)
        jobs = list(queue)
        if not jobs:
            return
        count = min(len(jobs), (self.jobs or 1) if self._here else _MOST_ELEMENTS)
        if self._here and count > 1:  # without Slurm, nothing else divides the machine
            threads = max(1, environment.threads() // count)
            jobs = [job.model_copy(update={"threads": threads, "at_once": count}) for job in jobs]
        for job in jobs:
            context.folder.log_path(job.cell.cell_id, job.attempt).touch()
            listener.begin(job.cell)
            listener.event(job.cell, {"event": "phase", "name": "with Slurm", "queued": True})
        permit = exchange / f"{_PERMIT}{uuid.uuid4().hex[:8]}"
        permit.touch()
        shares = [jobs[index::count] for index in range(count)]
        elements: list[Any] = []
        try:
            elements = self._submit(exchange, shares, context, permit)
            yield from self._gather(dict(zip(elements, shares, strict=True)), context, listener)
        except BaseException:
            permit.unlink(missing_ok=True)  # running elements end within seconds, waiting ones at their start
            if not self._here:
                for element in elements:
                    element.cancel(check=False)
                _await_cancelled(elements)  # they must not write Records after the footer
            raise
        finally:
            _await_local(elements if self._here else ())
            permit.unlink(missing_ok=True)

    def _submit(self, exchange: Path, shares: list[list[Job]], context: RunContext, permit: Path) -> list[Any]:
        executor = self._submitit.AutoExecutor(exchange, cluster="local" if self._here else "slurm")
        minutes = math.ceil(len(shares[0]) * context.timeout / 60) + _START_MIN
        executor.update_parameters(timeout_min=minutes, name="peft-harness")
        if not self._here:
            # The user's options are passed on unchanged; they override the time derived from --timeout.
            executor.update_parameters(
                slurm_array_parallelism=self.jobs or _MOST_ELEMENTS,
                slurm_additional_parameters={"no-requeue": True, **self._options},
            )
        specs = [[job.model_dump_json(by_alias=True) for job in share] for share in shares]
        arguments = zip(*[(context.timeout, self._command, str(permit))] * len(specs), strict=True)
        try:
            return list(executor.map_array(Element(), specs, *arguments))
        except self._submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split()) or "it printed nothing"
            raise HarnessError(
                f"sbatch refuses the array: {reason}",
                where=" ".join(f"--slurm {key}={value}" for key, value in self._options.items()) or "--executor slurm",
                hint="look up what this Slurm accepts (`sinfo`, `sacctmgr show assoc`), pass it by --slurm KEY=VALUE, "
                "and `--resume` the run",
            ) from error

    def _gather(
        self, shares: dict[Any, list[Job]], context: RunContext, listener: Listener
    ) -> Generator[Record, None, None]:
        """Yield each Record as soon as it appears in the run's folder.

        If an element has ended and one of its Cells has no Record, write and yield a Record with the cause of the
        element's end.
        """
        left = {job.cell.cell_id: job for share in shares.values() for job in share}
        submitted = store.now()
        states, poll_s, last = JobStates(here=self._here), _LOOK_S if self._here else _POLL_S, 0.0
        visible_s = 0.0 if self._here else node.VISIBLE_S
        ended: dict[Any, tuple[str, float]] = {}
        while left:
            files = {path.name for path in (context.folder.path / "cells").iterdir()}
            seen = [job for job in left.values() if f"{job.cell.cell_id}.{job.attempt}.json" in files]
            for job in seen:
                del left[job.cell.cell_id]
                yield store.read_record(context.folder.record_path(job.cell.cell_id, job.attempt))
            if not seen and time.monotonic() - last >= poll_s:
                last = time.monotonic()
                waiting = [
                    element
                    for element, share in shares.items()
                    if element not in ended and any(job.cell.cell_id in left for job in share)
                ]
                ended |= {element: (state, time.monotonic()) for element, state in states.ended(waiting)}
                for element in [one for one, (_, since) in ended.items() if time.monotonic() - since >= visible_s]:
                    state, since = ended.pop(element)
                    ending = _ending(element, state)
                    for job in shares[element]:
                        if left.pop(job.cell.cell_id, None):
                            yield node.final_record(job, context, ending, submitted, since)
            listener.tick()
            if not seen:
                time.sleep(_LOOK_S)


def end_orphans(folder: Path) -> None:
    """End array elements of the run in `folder` that still run although the runner was killed. This takes seconds."""
    for permit in folder.glob(f"{_EXCHANGE}/{_PERMIT}*"):
        permit.unlink(missing_ok=True)


def _ending(element: Any, state: str) -> Ending:
    """Return how an element ended: Slurm's state and, if submitit has saved one, the error that the element raised."""
    raised = ""
    if element.paths.result_pickle.exists() and (error := element.exception()) is not None:
        lines = str(error).strip().splitlines()
        raised = f": {lines[-1].strip()}" if lines else ""
    because = (
        f"its Slurm job {element.job_id} ended ({state}) and left no Record{raised}; see slurm/ in the run's folder"
    )
    return Ending(_STATES.get(state, Status.LOST), state.lower(), because)


def _await_cancelled(elements: Sequence[Any]) -> None:
    """Wait until cancelled elements have ended, but at most `_CANCEL_S` seconds. Slurm does not end them at once."""
    states, deadline, left = JobStates(here=False), time.monotonic() + _CANCEL_S, set(elements)
    while left := left - {element for element, _ in states.ended([*left])}:
        if time.monotonic() >= deadline:
            return
        time.sleep(_CANCEL_LOOK_S)


def _await_local(elements: Sequence[Any]) -> None:
    """Wait a few seconds for elements on this machine to end. Then cancel the elements that still run."""
    deadline = time.monotonic() + _GRACE_S
    while any(not element.done() for element in elements) and time.monotonic() < deadline:
        time.sleep(0.05)
    for element in elements:
        if not element.done():
            element.cancel(check=False)


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UsageError(
            "is not KEY=VALUE", where=f"--slurm {text}", hint="write e.g. --slurm partition=gpu --slurm gres=gpu:1"
        )
    return key.strip().lstrip("-").replace("_", "-"), value.strip()


class JobStates:
    """Finds out which of submitit's jobs have ended. submitit's own answer is wrong for the states PREEMPTED and SUSPENDED.

    here: whether the jobs are processes on this machine.
    """

    def __init__(self, *, here: bool) -> None:
        self._here = here
        self._unknown: dict[str, float] = {}

    def ended(self, jobs: Sequence[Any]) -> list[tuple[Any, str]]:
        """Return pairs (job, Slurm's state) of the jobs that have ended. One query to Slurm covers all jobs."""
        if self._here:
            return [(job, str(job.state)) for job in jobs if job.done()]
        if jobs:
            jobs[0].watcher.clear()  # otherwise it would not query a job again that it once considered ended
        found = [(job, state) for job in jobs if (state := self._final(job))]
        late = [job for job in jobs if time.monotonic() - self._unknown.get(job.job_id, math.inf) >= _UNKNOWN_S]
        queue = _queue({job.job_id.split("_")[0] for job in late}) if late else None
        return found if queue is None else [*found, *((job, GONE) for job in late if job.job_id not in queue)]

    def _final(self, job: Any) -> str:
        parts = str(job.state).split()  # e.g. `CANCELLED by 1000`
        state = parts[0].upper() if parts else "UNKNOWN"
        if state not in _FINAL and job.paths.result_pickle.exists():  # accounting is behind
            state = "COMPLETED"
        if state == "UNKNOWN":
            self._unknown.setdefault(job.job_id, time.monotonic())
        else:
            self._unknown.pop(job.job_id, None)
        return state if state in _FINAL else ""


def _queue(arrays: set[str]) -> set[str] | None:
    """Return the ids of the waiting and running elements of `arrays`. If Slurm does not answer, return None."""
    command = ["squeue", "--noheader", "--array", "--format=%i", "--jobs", ",".join(sorted(arrays))]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode and "Invalid job id" not in found.stderr:  # Slurm has forgotten a job that ended long ago
        return None
    return set(found.stdout.split())


EXECUTOR = ExecutorKind(
    "slurm",
    Slurm,
    option=ExecutorOption("slurm", "KEY=VALUE", "Option to pass on to sbatch, e.g. gres=gpu:1."),
    end_orphans=end_orphans,
)
