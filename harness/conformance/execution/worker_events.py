"""Events that the worker processes of `check` report to their parent: one JSON object each, with one key. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.methods.registry import TargetKind
from harness.process.workers import WorkerPool
from harness.records.base_model import FrozenModel

Target = tuple[str, TargetKind, str]
"""An implementation's name, and the kind and name of what it claims to be."""


class OfferedImplementation(FrozenModel):
    """An Implementation without its function."""

    name: str
    kind: TargetKind
    target: str
    dtypes: tuple[str, ...]
    requires: tuple[str, ...]
    point: str


class PointBegun(FrozenModel):
    """The import of an entry point begins."""

    begin: str


class Offered(FrozenModel):
    """All entry points are imported."""

    offered: list[OfferedImplementation]
    broken: dict[str, str]
    """Entry point -> why it cannot be used."""


class TargetBegun(FrozenModel):
    """The run of one implementation of a target begins."""

    begin: Target


class TargetEnded(FrozenModel):
    """The run of one implementation of a target has ended."""

    end: Target


class CaseBegun(FrozenModel):
    """A case begins."""

    case: str


class ModuleMissing(FrozenModel):
    """The implementation needs a module that is not installed."""

    missing: str


class CheckEnded(FrozenModel):
    """A check has ended."""

    tried: CheckOutcome
    execution: Execution = Execution.COMPLETED

    @property
    def outcome(self) -> CheckOutcome:
        """The outcome, with its execution, which its own JSON leaves out."""
        return self.tried.model_copy(update={"execution": self.execution})


class Died(FrozenModel):
    """The process has ended before its work was done. The last event."""

    died: str


DiscoveryEvent = PointBegun | Offered | Died
WorkerEvent = TargetBegun | TargetEnded | CaseBegun | ModuleMissing | CheckEnded | Died
_DISCOVERY: TypeAdapter[DiscoveryEvent] = TypeAdapter(DiscoveryEvent)
_WORKER: TypeAdapter[WorkerEvent] = TypeAdapter(WorkerEvent)


def of_discovery(pool: WorkerPool, request: Mapping[str, Any], patience: float) -> Iterator[DiscoveryEvent]:
    """Run a discovery worker and yield its events."""
    return _parsed(pool, "harness.conformance.execution.discovery_worker", request, patience, _DISCOVERY)


def of_worker(pool: WorkerPool, request: Mapping[str, Any], patience: float) -> Iterator[WorkerEvent]:
    """Run a worker and yield its events."""
    return _parsed(pool, "harness.conformance.execution.worker", request, patience, _WORKER)
