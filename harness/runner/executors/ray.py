"""On a Ray cluster: each Cell is a task. RAY_ADDRESS names the cluster; without it a Ray of this machine's own is started.

A task starts the same worker command as `local` does, and the worker dies with it. Nothing is retried: what Ray loses
(a worker, a node) is a `lost` Record, and `--resume` makes a new attempt. Progress shows Cells, not their phases.
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
from harness.errors import HarnessError, StoreError
from harness.records import environment, store
from harness.records.record import Record, Status
from harness.runner.attempt import Ending, RunContext
from harness.runner.executors import node
from harness.runner.executors.executor import Device, Listener

JOIN_PATIENCE_S = 120.0
_LOOK_S = 0.2
_UNSEEN = "no Record"
_STORE_B = 80 * 2**20  # the least that Ray takes: nothing goes through its object store


@dataclass(frozen=True)
class _Over:
    """An attempt whose task is over since then; until: when its Record, which is perhaps shown late, must be seen."""

    work: Job
    ending: Ending
    submitted: str
    since: float
    until: float

    def known(self, terms: RunContext) -> bool:
        """Whether its Record is there, or none will come; raises StoreError for one that was written out of our sight."""
        path = terms.folder.record_path(self.work.cell.cell_id, self.work.attempt)
        if path.exists() or time.monotonic() < self.until:
            return path.exists()
        if self.ending.kind == _UNSEEN:
            raise StoreError(
                "a machine of the cluster wrote this Record, and it is not seen here",
                where=str(path),
                hint="keep the run (--out) on a file system that every machine sees",
            )
        return True


class Ray:
    """jobs: Cells at a time, None for as many as the cluster holds. command: the worker's, instead of the usual one.

    patience: seconds that a cluster is given to bring what one Cell needs, at the start and when nodes have gone.
    """

    elsewhere = True

    def __init__(
        self, jobs: int | None = None, command: Sequence[str] | None = None, patience: float = JOIN_PATIENCE_S
    ) -> None:
        self.jobs, self._command, self._patience = jobs, command, patience
        self._device: Device = "cpu"
        self._ray: Any = None
        self._cpus = 1
        self._most: int = 2**20
        """Threads that this machine's own Ray may give a Cell; a cluster's machines are not bound by what holds here."""
        self._seen_s = node.SEEN_S
        self._blind: set[str] = set()

    def __enter__(self) -> Ray:
        address = os.environ.get("RAY_ADDRESS", "")
        # A task that is run again would be an attempt that nobody numbered. Ray reads these when it is imported.
        os.environ.update(RAY_task_oom_retries="0", RAY_USAGE_STATS_ENABLED="0")
        try:
            # Ray takes SIGTERM for itself, which asks a run to end.
            heard = signal.getsignal(signal.SIGTERM)
            import ray
        except ImportError as error:
            raise HarnessError(
                f"Ray cannot be imported ({error})", where="--executor ray", hint="pip install 'peft-harness[ray]'"
            ) from error
        told: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": "ERROR"}
        if not address:
            cores = environment.physical_cores()
            told |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _STORE_B}
        try:
            ray.init(**told)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise HarnessError(
                f"no Ray answers: {_first_sentence(error, type(error).__name__)}",
                where=f"RAY_ADDRESS={address}" if address else "a Ray of this machine's own",
                hint="set RAY_ADDRESS to the head's host:6379, or unset it to start a Ray here",
            ) from error
        finally:
            signal.signal(signal.SIGTERM, heard)
        self._ray = ray
        if not address:
            self._patience = 0.0  # nobody else knows of it, so nobody joins
            self._most = environment.threads()
            self._seen_s = 0.0  # and all it writes is seen here at once
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def device(self, wanted: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return `cuda` if the cluster has a GPU, unless something else is wanted."""
        self._device = "cuda" if wanted == "cuda" or (wanted == "auto" and self._gpus() > 0) else "cpu"
        self._enough()
        self._cpus = self._share()
        return self._device

    def run(self, works: Iterator[Job], terms: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Run them; see Executor.run."""
        ray = self._ray
        task = ray.remote(
            num_cpus=self._cpus, num_gpus=int(self._device == "cuda"), max_retries=0, max_calls=1
        )(node.measure)  # fmt: skip
        at_work: dict[Any, tuple[Job, str]] = {}
        over: list[_Over] = []
        more = True
        try:
            while True:
                while more and len(at_work) < self._at_once():
                    work = next(works, None)
                    if work is None:
                        more = False
                        break
                    work = work.model_copy(
                        update={"threads": min(self._cpus, self._most), "at_once": self._neighbours()}
                    )
                    terms.folder.log_path(work.cell.cell_id, work.attempt).touch()
                    listener.begin(work.cell)
                    listener.event(work.cell, {"event": "phase", "name": "with Ray"})
                    reference = task.remote([work.model_dump_json(by_alias=True)], terms.timeout, self._command)
                    at_work[reference] = work, store.now()
                if not at_work and not over:
                    if not more:
                        return
                    self._enough()  # every node has gone
                    continue
                ready: list[Any] = []
                if at_work:
                    ready, _ = ray.wait(list(at_work), num_returns=1, timeout=_LOOK_S if over else 1.0)
                else:
                    time.sleep(_LOOK_S)
                listener.tick()
                for reference in ready:
                    work, submitted = at_work.pop(reference)
                    ending, now = self._ending(reference), time.monotonic()
                    over.append(_Over(work, ending, submitted, now, now + self._seen_s))
                for one in [one for one in over if one.known(terms)]:
                    over.remove(one)
                    yield node.lost(one.work, terms, one.ending, one.submitted, one.since)
        finally:
            for reference in at_work:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.cancel(reference, force=True)

    def _ending(self, reference: Any) -> Ending:
        """Return how a task ended, for the case that it left no Record."""
        errors = self._ray.exceptions
        try:
            self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, node.UnseenError):
                self._blind.add(error.cause.node)
                if len(self._blind) < len(self._nodes()):  # others may see it
                    return Ending(Status.LOST, "unseen", str(error.cause))
            raise error.cause from error
        except errors.OutOfMemoryError as error:
            return Ending(Status.OOM, type(error).__name__, "Ray killed the worker: its machine's memory ran out")
        except errors.RayError as error:
            kind = type(error).__name__
            return Ending(Status.LOST, kind, f"Ray lost the worker or its machine: {_first_sentence(error, kind)}")
        return Ending(Status.LOST, _UNSEEN, "its Record vanished")

    def _nodes(self) -> list[dict[str, float]]:
        """Return what each living node has."""
        return [one["Resources"] for one in self._ray.nodes() if one["Alive"]]

    def _gpus(self) -> int:
        return sum(int(one.get("GPU", 0)) for one in self._nodes())

    def _places(self) -> list[int]:
        """Return how many Cells fit on each node."""
        if self._device == "cuda":
            return [min(int(one.get("GPU", 0)), int(one.get("CPU", 0)) // self._cpus) for one in self._nodes()]
        return [int(one.get("CPU", 0)) // self._cpus for one in self._nodes()]

    def _at_once(self) -> int:
        return min(sum(self._places()), self.jobs or sum(self._places()))

    def _neighbours(self) -> int:
        """Return how many Cells may be on the same node at a time."""
        most = max(self._places(), default=1)
        return max(1, min(most, self.jobs or most))

    def _share(self) -> int:
        """Return the cores of a Cell: a node's, divided by its GPUs, or by what `jobs` puts on it; at least one."""
        nodes = [one for one in self._nodes() if self._device == "cpu" or int(one.get("GPU", 0))]
        if self._device == "cuda":
            return max(1, int(min(one.get("CPU", 0) // int(one["GPU"]) for one in nodes)))
        cores = [int(one["CPU"]) for one in nodes if one.get("CPU")]
        return max(1, min(min(cores), sum(cores) // (self.jobs or 1)))

    def _enough(self) -> None:
        """Wait until one Cell fits somewhere; raises HarnessError if that does not happen in time."""
        deadline = time.monotonic() + self._patience
        while not any(self._places()):
            if time.monotonic() >= deadline:
                needs = f"{self._cpus} CPU" + (" and 1 GPU" if self._device == "cuda" else "")
                nodes = self._nodes()
                has = f"{len(nodes)} nodes, {sum(one.get('CPU', 0) for one in nodes):g} CPUs and {self._gpus()} GPUs"
                raise HarnessError(
                    f"a Cell needs {needs} on one node, and the cluster has {has}"
                    + (f" (waited {self._patience:g} s for more)" if self._patience else ""),
                    where="--executor ray",
                    hint="start nodes that have it (`ray start --address=HEAD:6379`), or choose --device cpu; "
                    "what was finished is kept",
                )
            time.sleep(min(1.0, self._patience))


def _first_sentence(error: Exception, otherwise: str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else otherwise
