"""Where Cells run: `local`, `ray`, `slurm`. All three start the same worker command, once per attempt."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from harness.cell.job import Work
from harness.errors import UsageError
from harness.records.record import Cell, Record
from harness.runner.attempt import Terms

Device = Literal["cpu", "cuda"]


class Listener(Protocol):
    """Who is told what goes on: the progress display, or nobody."""

    def begin(self, cell: Cell) -> None:
        """An attempt at this Cell has begun."""

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        """Its worker says something."""

    def tick(self) -> None:
        """About once a second, also while nothing happens. What it raises ends the run."""


class Executor(Protocol):
    """Runs attempts. A context manager: entering finds the machines, or raises HarnessError; leaving gives them back."""

    elsewhere: bool
    """Whether Cells run on other machines than the runner's."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def device(self, wanted: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return what Cells will run on; raises HarnessError if it is not to be had."""

    def run(self, works: Iterator[Work], terms: Terms, listener: Listener) -> Generator[Record, None, None]:
        """Give the Record of each attempt as it ends, in any order. Closing the iterator kills what still runs.

        An attempt's log is there from when `works` gave it: its number is used up, whatever happens.
        """


def choose(name: str, jobs: int | None = None, slurm: Sequence[str] = ()) -> Executor:
    """Return the executor of that name. jobs: Cells at a time, None as the executor sees fit; slurm: KEY=VALUE of sbatch."""
    if slurm and name != "slurm":
        raise UsageError(
            "is for --executor slurm", where=f"--slurm {slurm[0]}", mend="leave it out, or add --executor slurm"
        )
    if name == "ray":
        from harness.runner.executors.ray import Ray

        return Ray(jobs)
    if name == "slurm":
        from harness.runner.executors.slurm import Slurm

        return Slurm(jobs, slurm)
    from harness.runner.executors.local import Local

    return Local(jobs or 1)
