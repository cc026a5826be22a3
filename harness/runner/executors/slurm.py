"""On a Slurm cluster, through submitit: one array, one Cell per element as far as Slurm's usual limit goes, else a few.

The array outlives its runner: what it finishes counts when the run is resumed, and resuming calls the rest of it back.
Slurm never starts an element again (`--no-requeue`): a retry is a new attempt, by `--resume`.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.cell.job import Job
from harness.errors import HarnessError, UsageError
from harness.records import environment, store
from harness.records.record import Record, Status
from harness.runner.attempt import Ending, RunContext
from harness.runner.executors import node
from harness.runner.executors.executor import Device, Listener
from harness.runner.executors.slurm_states import States

LOCAL = "PEFT_HARNESS_SLURM"
_MOST_ELEMENTS = 1000  # Slurm's MaxArraySize is 1001 unless its administrator says otherwise
_START_MIN = 5  # what an element may take besides its Cells
_LOOK_S = 0.5
_ASK_S = 15.0
_GRACE_S = 10.0
_CANCEL_S, _CANCEL_LOOK_S = 45.0, 1.0  # Slurm itself gives a process 30 s (KillWait)
_STATES = {"TIMEOUT": Status.TIMEOUT, "OUT_OF_MEMORY": Status.OOM}


class Element:
    """What one element of the array does; called by submitit, on its machine."""

    def __call__(self, works: list[str], timeout: float, command: list[str] | None, wanted: str) -> None:
        """Run its Cells one after the other. Slurm's warnings go unheard: its own word for the end is told afterwards."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit would ask Slurm to start this element again
        node.measure(works, timeout, command, wanted)


class Slurm:
    """jobs: Cells at a time, None for as many as Slurm allows. options: KEY=VALUE of sbatch. command: the worker's."""

    elsewhere = True

    def __init__(
        self, jobs: int | None = None, options: Sequence[str] = (), command: Sequence[str] | None = None
    ) -> None:
        self.jobs, self._command = jobs, list(command) if command else None
        self._options = dict(_option(one) for one in options)
        self._here = os.environ.get(LOCAL) == "local"
        self._submitit: Any = None

    def __enter__(self) -> Slurm:
        if not self._here and shutil.which("sbatch") is None:
            raise HarnessError(
                "there is no Slurm here: no `sbatch` on the PATH",
                where="--executor slurm",
                hint=f"run it on a login node, or with --executor local; {LOCAL}=local tries the same path on this machine",
            )
        try:
            import submitit
        except ImportError as error:
            raise HarnessError(
                f"submitit cannot be imported ({error})",
                where="--executor slurm",
                hint="pip install 'peft-harness[slurm]'",
            ) from error
        self._submitit = submitit
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def device(self, wanted: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return `cuda` if GPUs are asked of Slurm, unless something else is wanted."""
        asked = "gpu" in self._options.get("gres", "") or any(key.startswith("gpus") for key in self._options)
        if wanted == "cuda" and not asked and not self._here:
            hint = "add --slurm gres=gpu:1, or --slurm gpus-per-node=1"
            raise UsageError("Slurm is not asked for a GPU", where="--device cuda", hint=hint)
        return "cuda" if wanted == "cuda" or (wanted == "auto" and asked) else "cpu"

    def run(self, works: Iterator[Job], terms: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Run them; see Executor.run. All are submitted at once."""
        exchange = terms.folder.path.resolve() / "slurm"
        exchange.mkdir(exist_ok=True)
        told = list(works)
        if not told:
            return
        elements = min(len(told), (self.jobs or 1) if self._here else _MOST_ELEMENTS)
        if self._here and elements > 1:  # nobody but us gives each its share
            threads = max(1, environment.threads() // elements)
            told = [work.model_copy(update={"threads": threads, "at_once": elements}) for work in told]
        for work in told:
            terms.folder.log_path(work.cell.cell_id, work.attempt).touch()
            listener.begin(work.cell)
            listener.event(work.cell, {"event": "phase", "name": "with Slurm", "queued": True})
        wanted = exchange / f"wanted-{uuid.uuid4().hex[:8]}"
        wanted.touch()
        shards = [told[index::elements] for index in range(elements)]
        jobs: list[Any] = []
        try:
            jobs = self._submit(exchange, shards, terms, wanted)
            yield from self._gather(dict(zip(jobs, shards, strict=True)), terms, listener)
        except BaseException:
            wanted.unlink(missing_ok=True)  # an element at work sees that within seconds; one that waits need not start
            if not self._here:
                for job in jobs:
                    job.cancel(check=False)
                _wait(jobs)  # or the footer would be written under their hands
            raise
        finally:
            _settle(jobs if self._here else ())
            wanted.unlink(missing_ok=True)

    def _submit(self, exchange: Path, shards: list[list[Job]], terms: RunContext, wanted: Path) -> list[Any]:
        executor = self._submitit.AutoExecutor(exchange, cluster="local" if self._here else "slurm")
        minutes = math.ceil(len(shards[0]) * terms.timeout / 60) + _START_MIN
        executor.update_parameters(timeout_min=minutes, name="peft-harness")
        if not self._here:
            # Slurm passes `--time=` and all else on as the user wrote it, over what we made of --timeout.
            executor.update_parameters(
                slurm_array_parallelism=self.jobs or _MOST_ELEMENTS,
                slurm_additional_parameters={"no-requeue": True, **self._options},
            )
        specs = [[work.model_dump_json(by_alias=True) for work in shard] for shard in shards]
        told = zip(*[(terms.timeout, self._command, str(wanted))] * len(specs), strict=True)
        try:
            return list(executor.map_array(Element(), specs, *told))
        except self._submitit.core.utils.FailedJobError as error:
            words = " ".join(str(error).split()) or "it said nothing"
            raise HarnessError(
                f"sbatch refuses the array: {words}",
                where=" ".join(f"--slurm {key}={value}" for key, value in self._options.items()) or "--executor slurm",
                hint="see what this Slurm takes (`sinfo`, `sacctmgr show assoc`), give it with --slurm KEY=VALUE, "
                "and `--resume` the run",
            ) from error

    def _gather(
        self, shards: dict[Any, list[Job]], terms: RunContext, listener: Listener
    ) -> Generator[Record, None, None]:
        """Give each Record as it appears; for what an element leaves without one, the Record that says so."""
        left = {work.cell.cell_id: work for shard in shards.values() for work in shard}
        submitted = store.now()
        states, ask_s, asked = States(here=self._here), _LOOK_S if self._here else _ASK_S, 0.0
        seen_s = 0.0 if self._here else node.SEEN_S
        ended: dict[Any, tuple[str, float]] = {}
        while left:
            there = {path.name for path in (terms.folder.path / "cells").iterdir()}
            seen = [work for work in left.values() if f"{work.cell.cell_id}.{work.attempt}.json" in there]
            for work in seen:
                del left[work.cell.cell_id]
                yield store.read_record(terms.folder.record_path(work.cell.cell_id, work.attempt))
            if not seen and time.monotonic() - asked >= ask_s:
                asked = time.monotonic()
                waited = [
                    job
                    for job, shard in shards.items()
                    if job not in ended and any(work.cell.cell_id in left for work in shard)
                ]
                ended |= {job: (state, time.monotonic()) for job, state in states.ended(waited)}
                for job in [job for job, (_, since) in ended.items() if time.monotonic() - since >= seen_s]:
                    state, since = ended.pop(job)
                    ending = _ending(job, state)
                    for work in shards[job]:
                        if left.pop(work.cell.cell_id, None):
                            yield node.lost(work, terms, ending, submitted, since)
            listener.tick()
            if not seen:
                time.sleep(_LOOK_S)


def _ending(job: Any, state: str) -> Ending:
    """Return how an element ended, in Slurm's word for it, and what went wrong in it as far as it could tell."""
    said = ""
    if job.paths.result_pickle.exists() and (error := job.exception()) is not None:
        lines = str(error).strip().splitlines()
        said = f": {lines[-1].strip()}" if lines else ""
    because = f"its Slurm job {job.job_id} ended ({state}) and left no Record{said}; see slurm/ in the run's folder"
    return Ending(_STATES.get(state, Status.LOST), state.lower(), because)


def _wait(jobs: Sequence[Any]) -> None:
    """Wait a little until cancelled elements are gone: Slurm only notes that they are to end."""
    states, deadline, left = States(here=False), time.monotonic() + _CANCEL_S, set(jobs)
    while left := left - {job for job, _ in states.ended([*left])}:
        if time.monotonic() >= deadline:
            return
        time.sleep(_CANCEL_LOOK_S)


def _settle(jobs: Sequence[Any]) -> None:
    """Wait a little for processes of this machine that are about to end, and cancel those that do not."""
    deadline = time.monotonic() + _GRACE_S
    while any(not job.done() for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.05)
    for job in jobs:
        if not job.done():
            job.cancel(check=False)


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UsageError(
            "is not KEY=VALUE", where=f"--slurm {text}", hint="write e.g. --slurm partition=gpu --slurm gres=gpu:1"
        )
    return key.strip().lstrip("-").replace("_", "-"), value.strip()
