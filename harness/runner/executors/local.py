"""On this machine: up to `jobs` Cells at a time, each in a process of its own; on GPUs, each with one for itself."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal

from harness.cell.job import Job
from harness.errors import HarnessError
from harness.records import environment, store
from harness.records.record import Record, Status
from harness.runner import gpus
from harness.runner.attempt import WORKER, Attempt, Ending, RunContext, record_of
from harness.runner.executors.executor import Device, Listener

GPU_PATIENCE_S = 60.0
_LOOK_S = 2.0  # nvidia-smi takes a third of a second itself
_ANSWER_S = 0.1  # between two looks whether it has answered


class Local:
    """jobs: Cells at a time. command: the worker's, to which two file descriptors are added. look: what GPUs there are.

    patience: seconds that a Cell waits for a GPU while we use none: for others, or for the driver to answer.
    """

    elsewhere = False

    def __init__(
        self,
        jobs: int = 1,
        command: Sequence[str] = WORKER,
        look: Callable[[], list[gpus.GpuDevice]] = gpus.look,
        patience: float = GPU_PATIENCE_S,
    ) -> None:
        self.jobs, self.command, self._look, self._patience = jobs, command, look, patience

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def device(self, wanted: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return `cuda` if there is a GPU, unless something else is wanted."""
        there = environment.gpus() if wanted != "cpu" else ()
        if wanted == "cuda" and not there:
            raise HarnessError(
                "no NVIDIA GPU was found",
                where="--device cuda",
                hint="run with --device cpu, or see `peft-harness doctor`",
            )
        if there and (cards := self._look()) and self.jobs > len(cards):
            raise HarnessError(
                f"{self.jobs} Cells at a time want a GPU each, and there are {len(cards)}",
                where=f"--jobs {self.jobs}",
                hint=f"--jobs {len(cards)}, or --device cpu",
            )
        return "cuda" if there else "cpu"

    def run(self, works: Iterator[Job], terms: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Run them; see Executor.run."""
        at_work: list[Attempt] = []
        waiting: Job | None = None
        look: gpus.GpuProbe | None = None
        since = looked = 0.0
        with selectors.DefaultSelector() as selector:
            try:
                while True:
                    while len(at_work) < self.jobs:
                        if waiting is None:
                            waiting, since, looked = next(works, None), time.monotonic(), 0.0
                            if waiting is None:
                                break
                            listener.begin(waiting.cell)
                        if waiting.device == "cuda" and look is None:
                            if time.monotonic() - looked < _LOOK_S:
                                break
                            look, looked = gpus.GpuProbe(self._look), time.monotonic()
                        if look is not None and not look.over():
                            break
                        if any(one.job.gpu for one in at_work):
                            since = looked  # a card of ours comes free, however long its Cell takes
                        placed, busy = self._placed(waiting, look, [one.job.gpu for one in at_work])
                        look = None
                        if placed is not None:
                            at_work.append(one := Attempt(placed, terms, self.command))
                            selector.register(one.events, selectors.EVENT_READ, one)
                        elif looked - since >= self._patience:
                            because = f"{busy}; it was waited for {self._patience:g} s"
                            yield record_of(
                                waiting, terms, Ending(Status.SKIPPED, "busy GPU", because), store.now(), since
                            )
                        else:
                            listener.event(waiting.cell, {"event": "phase", "name": "waiting for a GPU"})
                            break
                        waiting = None
                    if waiting is None and not at_work:
                        return
                    yield from self._follow(selector, at_work, listener, look)
            finally:
                for one in at_work:
                    one.kill()

    def _follow(
        self, selector: selectors.BaseSelector, at_work: list[Attempt], listener: Listener, look: gpus.GpuProbe | None
    ) -> Iterator[Record]:
        """Pass on what the workers say, for at most a second, and give the Records of those that have ended."""
        now = time.monotonic()
        left = min((one.deadline - now for one in at_work), default=1.0)
        if at_work:
            for key, _ in selector.select(max(0.0, min(left, 1.0 if look is None else _ANSWER_S))):
                for event in key.data.read():
                    listener.event(key.data.job.cell, event)
        elif look is not None:
            look.over(1.0)
        else:
            time.sleep(1.0)
        listener.tick()
        for one in [one for one in at_work if one.is_over]:
            selector.unregister(one.events)
            at_work.remove(one)  # from here on it kills itself, whatever happens
            yield one.end()

    def _placed(self, work: Job, look: gpus.GpuProbe | None, taken: Sequence[str]) -> tuple[Job | None, str]:
        """Return `work` with its share of this machine; or None, and who keeps it from it. look: one that is over."""
        share: dict[str, object] = {}
        if self.jobs > 1:
            share = {"threads": max(1, environment.threads() // self.jobs), "at_once": self.jobs}
        try:
            cards = look.seen() if look is not None else []
        except HarnessError as error:  # the Cells at work are well; it may answer the next time
            return None, error.what
        if not cards:
            return work.model_copy(update=share), ""
        ours = [card for card in cards if card.uuid not in taken]
        for card in ours:
            if not card.busy:
                return work.model_copy(update={**share, "gpu": card.uuid}), ""
        return None, "; ".join(card.busy for card in ours)
