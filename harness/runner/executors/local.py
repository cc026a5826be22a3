"""Run up to `jobs` Cells at a time on this machine. Each has its own process and, if there are GPUs, its own GPU."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Literal

from harness.cell.job import Job
from harness.errors import HarnessError
from harness.records import environment, store
from harness.records.record import Record, Status
from harness.runner import gpus
from harness.runner.attempt import Attempt, Ending, RunContext, record_of
from harness.runner.executors.executor import Device, ExecutorKind, Listener
from harness.runner.worker_start import WORKER, WorkerStarter

GPU_PATIENCE_S = 60.0
_PROBE_S = 2.0
"""Minimum seconds between two probes of the GPUs. A probe takes a third of a second."""
_ANSWER_S = 0.1
"""Maximum seconds to wait for events of workers while a probe of the GPUs runs."""
Probe = Future[list[gpus.GpuDevice]]


class Local:
    """The executor `local`.

    jobs: number of Cells that run at a time. command: command that starts a worker; two file descriptors are appended
    to it. list_gpus: function that returns the GPUs. patience: seconds that a Cell waits for a free GPU while this run uses
    no GPU.
    """

    is_remote = False

    def __init__(
        self,
        jobs: int = 1,
        command: Sequence[str] = WORKER,
        list_gpus: Callable[[], list[gpus.GpuDevice]] = gpus.list_gpus,
        patience: float = GPU_PATIENCE_S,
    ) -> None:
        self.jobs, self.command, self._list_gpus, self._patience = jobs, command, list_gpus, patience

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def device(self, requested: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return `cuda` or `cpu`: the requested device, or for `auto`, `cuda` if there is a GPU."""
        found = environment.gpus() if requested != "cpu" else ()
        if requested == "cuda" and not found:
            hint = "run with --device cpu, or see `peft-harness doctor`"
            raise HarnessError("no NVIDIA GPU was found", where="--device cuda", hint=hint)
        if found and (cards := self._list_gpus()) and self.jobs > len(cards):
            what = f"{self.jobs} Cells at a time need a GPU each, and there are {len(cards)}"
            raise HarnessError(what, where=f"--jobs {self.jobs}", hint=f"--jobs {len(cards)}, or --device cpu")
        return "cuda" if found else "cpu"

    def run(self, queue: Iterator[Job], context: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Run all jobs of `queue`, and yield the Record of each attempt when it ends."""
        running: list[Attempt] = []
        waiting: Job | None = None
        probe: Probe | None = None
        since = probed = 0.0
        with WorkerStarter(self.command) as starter, selectors.DefaultSelector() as selector:
            try:
                while True:
                    while len(running) < self.jobs:
                        if waiting is None:
                            waiting, since, probed = next(queue, None), time.monotonic(), 0.0
                            if waiting is None:
                                break
                            listener.begin(waiting.cell)
                        if waiting.device == "cuda" and probe is None:
                            if time.monotonic() - probed < _PROBE_S:
                                break
                            probe, probed = gpus.probe(self._list_gpus), time.monotonic()
                        if probe is not None and not probe.done():
                            break
                        if any(attempt.job.gpu for attempt in running):
                            since = probed  # this run will release a card, however long its Cell takes
                        placed, busy = self._place(waiting, probe, [attempt.job.gpu for attempt in running])
                        probe = None
                        if placed is not None:
                            starter.prepare(placed)  # before the Cell's time begins: the imports serve many Cells
                            if not running:
                                context.on_imports()
                            running.append(attempt := Attempt(placed, context, starter))
                            selector.register(attempt.events, selectors.EVENT_READ, attempt)
                        elif probed - since >= self._patience:
                            because = f"{busy}; it was waited for {self._patience:g} s"
                            yield record_of(
                                waiting, context, Ending(Status.SKIPPED, "busy GPU", because), store.now(), since
                            )
                        else:
                            listener.event(waiting.cell, {"event": "phase", "name": "waiting for a GPU"})
                            break
                        waiting = None
                    if waiting is None and not running:
                        return
                    yield from self._follow(selector, running, listener, probe)
            finally:
                for attempt in running:
                    attempt.kill()

    def _follow(
        self, selector: selectors.BaseSelector, running: list[Attempt], listener: Listener, probe: Probe | None
    ) -> Iterator[Record]:
        """Forward the workers' events for at most a second. Then yield the Records of attempts that have ended."""
        now = time.monotonic()
        left = min((attempt.deadline - now for attempt in running), default=1.0)
        if running:
            for key, _ in selector.select(max(0.0, min(left, 1.0 if probe is None else _ANSWER_S))):
                for event in key.data.read():
                    listener.event(key.data.job.cell, event)
        elif probe is not None:
            wait([probe], 1.0)
        else:
            time.sleep(1.0)
        listener.tick()
        for attempt in [attempt for attempt in running if attempt.is_over]:
            selector.unregister(attempt.events)
            running.remove(attempt)  # `end` kills it even after an error
            yield attempt.end()

    def _place(self, job: Job, probe: Probe | None, used: Sequence[str]) -> tuple[Job | None, str]:
        """Return `job` with its threads and its GPU, and "". If the job must wait, return None and the reason.

        probe: a finished probe of the GPUs. used: UUIDs of the GPUs that running Cells use.
        """
        share: dict[str, object] = {}
        if self.jobs > 1:
            share = {"threads": max(1, environment.threads() // self.jobs), "at_once": self.jobs}
        try:
            cards = probe.result() if probe is not None else []
        except HarnessError as error:  # running Cells are not affected, and the next probe may succeed
            return None, error.what
        if not cards:
            return job.model_copy(update=share), ""
        own = [card for card in cards if card.uuid not in used]
        for card in own:
            if not card.busy:
                return job.model_copy(update={**share, "gpu": card.uuid}), ""
        return None, "; ".join(card.busy for card in own)


EXECUTOR = ExecutorKind("local", lambda jobs, _: Local(jobs or 1))
