"""Protocols of an executor and of the listener it reports to."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from harness.cell.job import Job
from harness.records.record import Cell, Record
from harness.runner.attempt import RunContext

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

    def run(self, works: Iterator[Job], terms: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Give the Record of each attempt as it ends, in any order. Closing the iterator kills what still runs.

        An attempt's log is there from when `works` gave it: its number is used up, whatever happens.
        """
