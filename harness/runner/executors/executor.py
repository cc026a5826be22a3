"""The interfaces of executors and of their listeners, and the declaration of an executor."""

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
        """Handle the start of an attempt at `cell`."""

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        """Handle an event that the worker of `cell` has reported."""

    def tick(self) -> None:
        """Do periodic work, e.g. redraw a display. Executors call this about once a second. An error ends the run."""


class Executor(Protocol):
    """Runs attempts. Entering the context finds machines, or raises HarnessError. Leaving the context releases them."""

    is_remote: bool
    """True if Cells run on other machines than the runner."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def device(self, requested: Literal["auto", "cpu", "cuda"]) -> Device:
        """Return the device that Cells will run on. Raises HarnessError if the requested device is not available."""

    def run(self, queue: Iterator[Job], context: RunContext, listener: Listener) -> Generator[Record, None, None]:
        """Yield the Record of each attempt when it ends, in any order. Closing the iterator kills running attempts.

        The executor creates the log of an attempt before it takes the next job from `queue`. The number of an attempt
        depends on the logs, so no two attempts get the same number.
        """


@dataclass(frozen=True)
class ExecutorOption:
    """A command-line option of one executor. It may occur several times."""

    name: str
    """Name of the option without dashes."""
    metavar: str
    help: str


@dataclass(frozen=True)
class ExecutorKind:
    """The declaration of an executor. Each executor's module has one, called EXECUTOR.

    `--help` reads `name`, `help` and `option` from the source, without an import. They must therefore be literals.
    """

    name: str
    """The value of `--executor`."""
    make: Callable[[int | None, Sequence[str]], Executor]
    """Makes an executor from two arguments: the number of Cells at a time (None for the executor's default), and the
    values of `option`."""
    help: str = ""
    """A sentence for `--help` about the environment variables that the executor reads."""
    option: ExecutorOption | None = None
    end_orphans: Callable[[Path], None] | None = None
    """Ends Cells of the run in a folder that still run although their runner was killed. None if no Cell outlives its
    runner."""
