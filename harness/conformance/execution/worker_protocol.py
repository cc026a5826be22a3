"""Messages between `check` and its workers: the task of a worker, and the events that it reports. Imports no torch.

An event is one JSON object on the worker's pipe. Its keys tell which event it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.findings.outcomes import CheckOutcome
from harness.methods.registry import TargetKind
from harness.process.event_pipe import EventWriter
from harness.process.worker_pool import WorkerPool
from harness.records.base_model import FrozenModel
from harness.records.record import Environment

Target = tuple[str, TargetKind, str]
"""(name of an implementation, kind of its target, name of its target)"""


class WorkerTask(FrozenModel):
    """Targets that one process runs. All belong to one entry point, which the process imports only once."""

    point: str
    targets: list[Target]
    breadth: CaseSelection = FEW
    dtypes: tuple[str, ...] = ()
    """The dtypes to try. Empty for all dtypes."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device of the tensors."""


class PointBegun(FrozenModel):
    """The import of an entry point begins."""

    begin: str


class Offered(FrozenModel):
    """All entry points are imported. The event lists what they offer."""

    offered: list[dict[str, Any]]
    """Fields of the Implementations, without their functions."""
    broken: dict[str, str]
    """Entry point -> reason why it cannot be used."""
    environment: Environment
    """Machine and software of the worker."""


class TargetBegun(FrozenModel):
    """The checks of a target, for one implementation, begin."""

    begin: Target


class TargetEnded(FrozenModel):
    """The checks of a target, for one implementation, have ended."""

    end: Target


class CaseBegun(FrozenModel):
    """A case begins."""

    case: str


class ModuleMissing(FrozenModel):
    """The implementation cannot run here, because a module is not installed."""

    missing: str
    """Text that names the missing module."""


class CheckEnded(FrozenModel):
    """A check has ended."""

    outcome: CheckOutcome


class Died(FrozenModel):
    """The process ended, or was killed, before its work was done. This is the last event."""

    died: str


DiscoveryEvent = PointBegun | Offered | Died
WorkerEvent = TargetBegun | TargetEnded | CaseBegun | ModuleMissing | CheckEnded | Died

_Event = TypeVar("_Event")
_DISCOVERY: TypeAdapter[DiscoveryEvent] = TypeAdapter(DiscoveryEvent)
_WORKER: TypeAdapter[WorkerEvent] = TypeAdapter(WorkerEvent)


def send(emit: EventWriter, event: FrozenModel) -> None:
    """Write an event to the pipe as JSON."""
    emit(**event.model_dump(mode="json"))


def discovery_events(pool: WorkerPool, without: list[str], patience: float) -> Iterator[DiscoveryEvent]:
    """Import all entry points but those in `without` in a worker, and yield the events that the worker reports."""
    module = "harness.conformance.execution.discovery_worker"
    yield from parsed(pool.events(module, {"without": without}, patience), _DISCOVERY)


def worker_events(pool: WorkerPool, task: WorkerTask, patience: float) -> Iterator[WorkerEvent]:
    """Run a task in a worker, and yield the events that the worker reports."""
    module = "harness.conformance.execution.worker"
    yield from parsed(pool.events(module, task.model_dump(mode="json"), patience), _WORKER)


def parsed(events: Iterator[Mapping[str, Any]], event: TypeAdapter[_Event]) -> Iterator[_Event | Died]:
    """Yield the events of a worker as models. If an object is not a valid event, yield `Died` and stop."""
    for one in events:
        try:
            parsed = event.validate_python(one, strict=False)  # JSON has strings for enums, and lists for tuples
        except ValidationError:  # the code under test has written to the pipe
            yield Died(died=f"wrote {str(one)[:40]!r} to the pipe for results; killed")
            return
        yield parsed
