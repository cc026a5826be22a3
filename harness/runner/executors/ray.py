"""Run Cells as tasks of a Ray cluster. RAY_ADDRESS names the cluster. If it is not set, Ray is started on this machine.

A task starts the same worker command as `local`, and the worker dies with the task. Nothing is retried: if Ray loses a
worker or a node, the Record is `lost`, and `--resume` makes a new attempt. The progress display does not show the
phases of a Cell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.cell.job import Job
from harness.errors import HarnessError, StoreError, import_extra
from harness.records import environment, store
from harness.records.record import Record, Status
from harness.runner.attempt import Ending, RunContext
from harness.runner.executors import node
from harness.runner.executors.executor import Device, ExecutorKind, Listener

JOIN_PATIENCE_S = 120.0
_LOOK_S = 0.2
_NO_RECORD = "no Record"
_STORE_B = 80 * 2**20
"""Size of Ray's object store in bytes: the smallest size that Ray accepts. No Cell uses the store."""


@dataclass(frozen=True)
class _Finished:
    """An attempt whose task has ended. Its Record may not be visible on this machine yet."""

    job: Job
    ending: Ending
    submitted: str
    since: float
    """Value of time.monotonic() when the task ended."""
    until: float
    """Value of time.monotonic() when the wait for the Record ends."""

    def is_known(self, context: RunContext) -> bool:
        """Return True if the Record is visible on this machine, or if the wait for it has ended.

        Raises StoreError if another machine wrote the Record, but it is not visible when the wait ends.
        """
        path = context.folder.record_path(self.job.cell.cell_id, self.job.attempt)
        if path.exists() or time.monotonic() < self.until:
            return path.exists()
        if self.ending.kind == _NO_RECORD:
            what = "a machine of the cluster wrote this Record, but it is not visible here"
            hint = "keep the run (--out) on a file system that every machine sees"
            raise StoreError(what, where=str(path), hint=hint)
        return True


class Ray:
    """The executor `ray`.

    jobs: maximum number of Cells that run at a time; by default, as many as fit. command: replaces the usual command of
    the worker. patience: seconds to wait for a node on which a Cell fits, at the start and after the loss of all nodes.
    """

    is_remote = True

    def __init__(
        self, jobs: int | None = None, command: Sequence[str] | None = None, patience: float = JOIN_PATIENCE_S
    ) -> None:
        self.jobs, self._command, self._patience = jobs, command, patience
        self._device: Device = "cpu"
        self._ray: Any = None
        self._cpus = 1
        """Cores for each Cell."""
        self._max_threads: int = 2**20
        """Maximum number of threads per Cell. No effect on a cluster: `node.run_jobs` limits the threads there."""
        self._visible_s = node.VISIBLE_S
        self._blind: set[str] = set()
        """Names of the nodes that cannot see the run's folder or an asset."""

    def __enter__(self) -> Ray:
        address = os.environ.get("RAY_ADDRESS", "")
        # A retried task would be an attempt without a number. Ray reads these variables when it is imported.
        os.environ.update(RAY_task_oom_retries="0", RAY_USAGE_STATS_ENABLED="0")
        # Ray installs a handler for SIGTERM, the signal that ends a run.
        handler = signal.getsignal(signal.SIGTERM)
        ray: Any = import_extra("ray", "--executor ray")
        options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": "ERROR"}
        if not address:
            cores = environment.physical_cores()
            options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _STORE_B}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise HarnessError(
                f"no Ray answers: {_first_line(error, type(error).__name__)}",
                where=f"RAY_ADDRESS={address}" if address else "a Ray of this machine's own",
                hint="set RAY_ADDRESS to HOST:6379 of Ray's head, or unset it to start Ray on this machine",
            ) from error
        finally:
            signal.signal(signal.SIGTERM, handler)
        self._ray = ray
        if not address:
            self._patience = 0.0  # no other machine can join
            self._max_threads = environment.threads()
            self._visible_s = 0.0  # this Ray runs on this machine, so its files are visible at once
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def device(self, requested: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return `cuda` or `cpu`: the requested device, or for `auto`, `cuda` if the cluster has a GPU."""
        self._device = "cuda" if requested == "cuda" or (requested == "auto" and self._gpus() > 0) else "cpu"
        self._wait_for_room()
        self._cpus = self._share()
        return self._device

    def run(self, queue: Iterator[Job], context: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Run all jobs of `queue`, and yield the Record of each attempt when it ends."""
        ray = self._ray
        task = ray.remote(
            num_cpus=self._cpus, num_gpus=int(self._device == "cuda"), max_retries=0, max_calls=1
        )(node.run_jobs)  # fmt: skip
        running: dict[Any, tuple[Job, str]] = {}
        finished: list[_Finished] = []
        more = True
        try:
            while True:
                while more and len(running) < self._capacity():
                    job = next(queue, None)
                    if job is None:
                        more = False
                        break
                    share = {"threads": min(self._cpus, self._max_threads), "at_once": self._cells_per_node()}
                    job = job.model_copy(update=share)
                    context.folder.log_path(job.cell.cell_id, job.attempt).touch()
                    listener.begin(job.cell)
                    listener.event(job.cell, {"event": "phase", "name": "with Ray"})
                    reference = task.remote([job.model_dump_json(by_alias=True)], context.timeout, self._command)
                    running[reference] = job, store.now()
                if not running and not finished:
                    if not more:
                        return
                    self._wait_for_room()  # all nodes are lost
                    continue
                ready: list[Any] = []
                if running:
                    ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_S if finished else 1.0)
                else:
                    time.sleep(_LOOK_S)
                listener.tick()
                for reference in ready:
                    job, submitted = running.pop(reference)
                    ending, now = self._ending(reference), time.monotonic()
                    finished.append(_Finished(job, ending, submitted, now, now + self._visible_s))
                for one in [one for one in finished if one.is_known(context)]:
                    finished.remove(one)
                    yield node.final_record(one.job, context, one.ending, one.submitted, one.since)
        finally:
            for reference in running:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.cancel(reference, force=True)

    def _ending(self, reference: Any) -> Ending:
        """Return how a task ended. The result is used only if the worker has not written a Record.

        Raises the error that the task raised. But for a MissingPathError, the result has the status LOST as long as
        another node may see the path.
        """
        errors = self._ray.exceptions
        try:
            self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, node.MissingPathError):
                self._blind.add(error.cause.node)
                if len(self._blind) < len(self._nodes()):  # other nodes may see the path
                    return Ending(Status.LOST, "unseen", str(error.cause))
            raise error.cause from error
        except errors.OutOfMemoryError as error:
            return Ending(Status.OOM, type(error).__name__, "Ray killed the worker: its machine's memory ran out")
        except errors.RayError as error:
            kind = type(error).__name__
            return Ending(Status.LOST, kind, f"Ray lost the worker or its machine: {_first_line(error, kind)}")
        return Ending(Status.LOST, _NO_RECORD, "its Record vanished")

    def _nodes(self) -> list[dict[str, float]]:
        """Return the resources of each living node, as a dict of resource names and amounts."""
        return [one["Resources"] for one in self._ray.nodes() if one["Alive"]]

    def _gpus(self) -> int:
        return sum(int(one.get("GPU", 0)) for one in self._nodes())

    def _room(self) -> list[int]:
        """Return one number per node: how many Cells fit on it."""
        if self._device == "cuda":
            return [min(int(one.get("GPU", 0)), int(one.get("CPU", 0)) // self._cpus) for one in self._nodes()]
        return [int(one.get("CPU", 0)) // self._cpus for one in self._nodes()]

    def _capacity(self) -> int:
        return min(sum(self._room()), self.jobs or sum(self._room()))

    def _cells_per_node(self) -> int:
        """Return the maximum number of Cells on one node at a time."""
        most = max(self._room(), default=1)
        return max(1, min(most, self.jobs or most))

    def _share(self) -> int:
        """Return the number of cores for each Cell, at least 1.

        With GPUs, this is a node's cores divided by its GPUs. Without GPUs, it is all cores divided by `jobs`, but at
        most the cores of the smallest node.
        """
        nodes = [one for one in self._nodes() if self._device == "cpu" or int(one.get("GPU", 0))]
        if self._device == "cuda":
            return max(1, int(min(one.get("CPU", 0) // int(one["GPU"]) for one in nodes)))
        cores = [int(one["CPU"]) for one in nodes if one.get("CPU")]
        return max(1, min(min(cores), sum(cores) // (self.jobs or 1)))

    def _wait_for_room(self) -> None:
        """Wait until one Cell fits on a node. Raises HarnessError after `patience` seconds."""
        deadline = time.monotonic() + self._patience
        while not any(self._room()):
            if time.monotonic() >= deadline:
                needs = f"{self._cpus} CPU" + (" and 1 GPU" if self._device == "cuda" else "")
                nodes = self._nodes()
                has = f"{len(nodes)} nodes, {sum(one.get('CPU', 0) for one in nodes):g} CPUs and {self._gpus()} GPUs"
                raise HarnessError(
                    f"a Cell needs {needs} on one node, and the cluster has {has}"
                    + (f" (waited {self._patience:g} s for more)" if self._patience else ""),
                    where="--executor ray",
                    hint="start nodes that have it (`ray start --address=HEAD:6379`), or choose --device cpu; "
                    "finished Cells are saved",
                )
            time.sleep(min(1.0, self._patience))


def _first_line(error: Exception, otherwise: str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else otherwise


EXECUTOR = ExecutorKind(
    "ray", lambda jobs, _: Ray(jobs), help="ray connects to RAY_ADDRESS, or starts Ray on this machine."
)
