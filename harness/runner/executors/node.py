"""What a machine of a cluster does: its share of the Cells, one after the other, as `local` does them."""

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
from harness.runner.attempt import WORKER, Ending, RunContext, record_of
from harness.runner.executors.local import Local

SEEN_S = 60.0
"""How late a network file system may show what another machine has written."""
_BEGUN = "begun on "


class UnwantedError(HarnessError):
    """The runner has called its Cells back."""


class UnseenError(StoreError):
    """A machine does not see what its Cells need: it is `node`."""

    node: str


def recall(folder: Path) -> None:
    """Call back the Cells of an array that a killed runner of this run left behind: they end within seconds."""
    for wanted in folder.glob("slurm/wanted-*"):
        wanted.unlink(missing_ok=True)


class _Listener:
    """Tells nobody, and ends when the file that says so goes away."""

    def __init__(self, wanted: Path | None) -> None:
        self._wanted = wanted

    def begin(self, cell: Cell) -> None:
        self.tick()

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        pass

    def tick(self) -> None:
        if self._wanted is not None and not self._wanted.exists():
            raise UnwantedError("the run was ended or resumed elsewhere", where=str(self._wanted))


def measure(
    works: Sequence[str], timeout: float, command: Sequence[str] | None = None, wanted: str | None = None
) -> None:
    """Run attempts (each a Work as JSON) on this machine, until done or until the file `wanted` is gone.

    Every attempt leaves its Record in the run's folder. Raises UnseenError where that folder, or an asset, is not seen.
    """
    told = [Job.model_validate_json(work) for work in works]
    folder, node = store.RunFolder(Path(told[0].folder)), os.uname().nodename
    for needed in {told[0].folder, *(path for work in told for path in _needed(work))}:
        if not Path(needed).exists():
            error = UnseenError(
                f"is not there on {node}",
                where=needed,
                hint="keep the run (--out) and the cache (PEFT_HARNESS_CACHE) on a file system that every machine sees",
            )
            error.node = node
            raise error
    most = environment.threads()  # nodes differ: what one holds may be more than this one has
    told = [work.model_copy(update={"threads": min(work.threads, most)}) if work.threads else work for work in told]
    terms = RunContext(folder, environment.describe(most), timeout)
    listener = _Listener(Path(wanted) if wanted else None)
    with contextlib.closing(
        Local(command=command or WORKER).run(_each(told, folder, node), terms, listener)
    ) as records:
        for _ in records:
            pass


def _needed(work: Job) -> Iterator[str]:
    yield from (asset.path for asset in (work.model, work.data, work.task.train) if asset)
    if work.task.file:
        yield work.task.file


def _each(works: Sequence[Job], folder: store.RunFolder, node: str) -> Iterator[Job]:
    """Give them as they are taken up; the log of each begins with when that was, for `lost` to read."""
    for work in works:
        with contextlib.suppress(OSError):  # what is wrong with the folder, its worker will tell
            folder.log_path(work.cell.cell_id, work.attempt).write_text(f"{_BEGUN}{node} at {store.now()}\n")
        yield work


def lost(work: Job, terms: RunContext, ending: Ending, submitted: str, over: float) -> Record:
    """Return the Record of an attempt whose machine tells no more, since `over` (time.monotonic()): its own, if it is there.

    Its time is counted from when a machine took it up. One that none did is lost, whatever ended its machine.
    """
    started = _taken_up(terms.folder.log_path(work.cell.cell_id, work.attempt))
    if started is None:
        ending = Ending(Status.LOST, "never started", f"it never started: {ending.because}")
        return record_of(work, terms, ending, submitted, time.monotonic())
    waited = time.monotonic() - over
    age = (datetime.now(UTC) - started).total_seconds() - waited
    begun = time.monotonic() - max(0.0, age)  # the clocks of two machines may differ
    return record_of(work, terms, ending, started.strftime("%Y-%m-%dT%H:%M:%SZ"), begun)


def _taken_up(log: Path) -> datetime | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = log.read_text(errors="replace").splitlines()[0]
        if first.startswith(_BEGUN):
            return datetime.fromisoformat(first.rsplit(" ", 1)[1])
    return None
