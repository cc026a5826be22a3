"""Messages between `check PATH` and the worker that runs loaders. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import TypeAdapter

from harness.conformance.execution.worker_protocol import Died, parsed
from harness.process.worker_pool import WorkerPool
from harness.records.base_model import FrozenModel


class LoaderTask(FrozenModel):
    """Task of a worker: an adapter file, and the loaders to run with it."""

    adapter: str
    """Path of the safetensors file."""
    base: str
    """Folder of the base model."""
    loaders: list[tuple[str, str]]
    """Pairs (name of a loader, entry point that offers it)."""


class LoaderLogits(FrozenModel):
    """The comparison of one loader's logits with those of the reference."""

    loader: str
    verdict: Literal["agrees", "differs", "raises", "unsupported", "not compared"]
    largest: float | None = None
    """Largest absolute difference of a logit. None if it is not finite, or if nothing was compared."""
    share: float | None = None
    """The error divided by the allowed error, by the tolerance policy `carried-noise`."""
    detail: str = ""
    """The worst logit, the exception that the loader raised, or the reason why nothing was compared."""
    defect: str = ""
    """Id of the known defect that explains the verdict. Empty if there is none."""


class ReferenceComputed(FrozenModel):
    """Event: the reference has computed logits. This event shows that the worker does not hang."""

    runs: int
    """Number of computations so far for this loader, or 0 for the computation in float64."""


class LoaderBegun(FrozenModel):
    """Event: the worker starts with the loader that `begin` names."""

    begin: str


class Compared(FrozenModel):
    """Event: a loader was compared, or it raised an exception."""

    result: LoaderLogits


class NotComparable(FrozenModel):
    """Event: the reference cannot compute the logits, so neither the current loader nor a later one is compared."""

    reason: str


LoaderEvent = ReferenceComputed | LoaderBegun | Compared | NotComparable | Died
_EVENT: TypeAdapter[LoaderEvent] = TypeAdapter(LoaderEvent)


def loader_events(pool: WorkerPool, task: LoaderTask, patience: float) -> Iterator[LoaderEvent]:
    """Run a task in a worker, and yield the events that the worker reports."""
    module = "harness.conformance.adapter_files.loader_worker"
    yield from parsed(pool.events(module, task.model_dump(mode="json"), patience), _EVENT)
