"""Protocols of an executor and of its listener, and the declaration of an executor."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

if TYPE_CHECKING:
    from harness.cell.job import Job
    from harness.records.record import Cell, Record
    from harness.runner.attempt import RunContext

Device = Literal["cpu", "cuda"]


class Listener(Protocol):
    """Receives the progress of a run."""

    def begin(self, cell: Cell) -> None:
        """An attempt at this Cell has begun."""

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        """Its worker reports an event."""

    def tick(self) -> None:
        """Called about once a second, even if nothing happens. An exception ends the run."""


class Executor(Protocol):
    """Runs attempts. A context manager: entering finds the machines, or raises HarnessError; leaving releases them."""

    is_remote: bool
    """True if Cells run on other machines than the runner's."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def device(self, requested: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return the device that Cells will run on; raises HarnessError if it is not available."""

    def run(self, queue: Iterator[Job], context: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Yield the Record of each attempt as it ends, in any order. Closing the iterator kills running attempts.

        An attempt's log exists as soon as `queue` yields the job, so its number is never reused.
        """


@dataclass(frozen=True)
class ExecutorOption:
    """A command-line option of one executor. It may occur several times."""

    name: str
    """Without its dashes."""
    metavar: str
    help: str


@dataclass(frozen=True)
class ExecutorKind:
    """The declaration of an executor: the constant EXECUTOR of its module in this package.

    `--help` reads `name`, `help` and `option` from the source (`executors.options`), so they are written as literals.
    """

    name: str
    """The value of `--executor`."""
    make: Callable[[int | None, Sequence[str]], Executor]
    """Makes an executor from the number of Cells at a time (None: its default) and the values of `option`."""
    help: str = ""
    """A sentence for `--help` about the environment variables that it reads."""
    option: ExecutorOption | None = None
    recall: Callable[[Path], None] | None = None
    """Ends the Cells that a killed runner of the run in this folder has left running; None if they end with it."""
