"""Messages between `check` and its workers: the task of a worker, and the events that it reports. Imports no torch.

An event is one JSON object on the worker's pipe. The keys of the object show which event it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.findings.outcomes import CheckOutcome
from harness.methods.registry import TargetKind
from harness.process.event_pipe import EventWriter
from harness.process.worker_pool import WorkerPool
from harness.records.base_model import FrozenModel
from harness.records.record import Environment

Target = tuple[str, TargetKind, str]
"""(name of an implementation, kind of the target, name of the target). A target is a Method, an Operation, a base or
the loaders."""


class WorkerTask(FrozenModel):
    """Targets that one process runs. All belong to one entry point, which the process imports only once."""

    point: str
    targets: list[Target]
    breadth: CaseSelection = FEW
    dtypes: tuple[str, ...] = ()
    """Dtypes to try. If empty, all are tried."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device of the tensors."""


class PointBegun(FrozenModel):
    """Event before the import of an entry point."""

    begin: str


class Offered(FrozenModel):
    """Event after the import of all entry points: lists what they offer."""

    offered: list[dict[str, Any]]
    """Fields of the Implementations, without their functions."""
    broken: dict[str, str]
    """Entry point -> reason why it cannot be used."""
    environment: Environment
    """Machine and software of the worker."""


class TargetBegun(FrozenModel):
    """Event before the checks of one target of one implementation."""

    begin: Target


class TargetEnded(FrozenModel):
    """Event after the checks of one target of one implementation."""

    end: Target


class CaseBegun(FrozenModel):
    """Event before the checks of a case."""

    case: str


class ModuleMissing(FrozenModel):
    """Event if the implementation cannot run here, because a module is not installed."""

    missing: str
    """Text that names the missing module."""


class CheckEnded(FrozenModel):
    """Event after a check, with its outcome."""

    outcome: CheckOutcome


class Died(FrozenModel):
    """Last event of a process that ended, or was killed, before its work was done."""

    died: str


DiscoveryEvent = PointBegun | Offered | Died
WorkerEvent = CheckEnded | CaseBegun | TargetBegun | TargetEnded | ModuleMissing | Died

_Event = TypeVar("_Event")
_DISCOVERY: TypeAdapter[DiscoveryEvent] = TypeAdapter(DiscoveryEvent)
_WORKER: TypeAdapter[WorkerEvent] = TypeAdapter(Annotated[WorkerEvent, Field(union_mode="left_to_right")])
"""Most events are a CheckEnded. No object is valid as two events, so the first match is the only one."""


def send(emit: EventWriter, event: FrozenModel) -> None:
    """Write an event to the worker's pipe as JSON. emit: function that writes one JSON object."""
    emit(**event.model_dump(mode="json"))


def discovery_events(pool: WorkerPool, without: list[str], patience: float) -> Iterator[DiscoveryEvent]:
    """In a worker, import all entry points except those in `without`. Yield the events that the worker reports."""
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
