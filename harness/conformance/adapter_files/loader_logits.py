"""Compare the logits that loaders compute from one adapter file with those of the reference, in worker processes.

A loader that hangs, crashes, prints or leaves processes behind therefore spoils only its own result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.loader_protocol import (
    Compared,
    LoaderBegun,
    LoaderLogits,
    LoaderTask,
    NotComparable,
    loader_events,
)
from harness.conformance.execution import worker_processes
from harness.conformance.execution.worker_processes import PATIENCE
from harness.conformance.execution.worker_protocol import Died
from harness.conformance.findings import defects
from harness.console import print_note
from harness.methods.loader import ADAPTER_FILES
from harness.methods.registry import Implementation, Registry, discover
from harness.process.worker_pool import WorkerPool

DEFAULT = "hf-peft"
"""Loader that is compared if the user names none."""
_OWN = (DEFAULT, "reference")
_B_PER_PARAMETER = 12
"""Number of bytes that a comparison needs per parameter: 8 for the reference in float64, and 4 for a float32 copy."""
_TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
"""Values of task_type whose models return logits for token ids alone."""


@dataclass(frozen=True)
class LoaderRequest:
    """Options of a user: which loaders to compare with the reference, and how long to wait for them."""

    names: Sequence[str] = ()
    """Names of loaders. If empty, DEFAULT is compared."""
    patience: float = PATIENCE
    """Seconds without a result after which a loader counts as hanging."""

    def registry(self) -> Registry:
        """Return a Registry that has the named loaders. Plug-ins are imported only in a worker process."""
        return discover(only=_OWN) if set(self.names) <= set(_OWN) else worker_processes.discover(self.patience)


def compare(
    adapter: AdapterFile, folder: Path, base: nn.Module, used: Sequence[str], request: LoaderRequest
) -> list[LoaderLogits]:
    """Compare each requested loader with the reference, and return one result per loader.

    folder: folder of the base model. base: the same model without weights. used: the adapter's features, from
    `loader_readings.features`. A loader whose library is not installed gets the verdict `not compared`. Raises
    ImplementationError for an unknown name.
    """
    registry = request.registry()
    loaders = [registry.find("loader", ADAPTER_FILES, name) for name in request.names or [DEFAULT]]
    missing = {one.name: [library for library in one.requires if find_spec(library) is None] for one in loaders}
    able = [one for one in loaders if not missing[one.name]]
    found = {name: _not_compared(name, f"not installed: {', '.join(of)}") for name, of in missing.items() if of}
    if able and (reason := _reason(adapter, base)):
        found |= {one.name: _not_compared(one.name, reason) for one in able}
    elif able:
        found |= _run(adapter, folder, able, request.patience)
    return [_explained(found[one.name], used) for one in loaders]


def _not_compared(loader: str, reason: str) -> LoaderLogits:
    return LoaderLogits(loader=loader, verdict="not compared", detail=reason)


def _reason(adapter: AdapterFile, base: nn.Module) -> str:
    """Return the reason why the logits cannot be compared. If they can, return an empty string."""
    config: Any = getattr(base, "config", None)
    if (task := adapter.settings.task_type) not in _TASKS:
        return f"task_type is {task}; only logits of causal models and of classifiers are compared"
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(base).__name__} needs tokens for its decoder too"
    need = _B_PER_PARAMETER * sum(one.numel() for one in base.parameters())
    free = psutil.virtual_memory().available
    if need > free:
        return f"the reference in float64 needs about {need / 2**30:.0f} GiB of memory; {free / 2**30:.0f} GiB are free"
    return ""


def _run(
    adapter: AdapterFile, folder: Path, loaders: Sequence[Implementation], patience: float
) -> dict[str, LoaderLogits]:
    """Run loaders one after the other, and map their names to the results.

    After a crash or a hang, a new process runs the loaders that had not begun. The results of earlier loaders are kept.
    If the process dies while no loader runs, a note on stderr says so.
    """
    remaining, found, pool = {one.name: one.point for one in loaders}, dict[str, LoaderLogits](), WorkerPool()
    while remaining:
        current, answered = "", list[str]()
        task = LoaderTask(adapter=str(adapter.weights), base=str(folder), loaders=list(remaining.items()))
        for event in loader_events(pool, task, patience):
            match event:
                case LoaderBegun(begin=current):
                    del remaining[current]
                case Compared(result=result):
                    found[result.loader] = result
                    answered.append(current)
                    current = ""
                case Died(died=how) if current:
                    found[current] = LoaderLogits(loader=current, verdict="raises", detail=how)
                case Died(died=how) if answered:
                    print_note(f"note: after the logits of {', '.join(answered)} were compared: {how}")
                case Died(died=how):
                    reason = f"the reference: {how}; if it needs longer: --patience SECONDS"
                    found |= {name: _not_compared(name, reason) for name in remaining}
                    remaining = {}
                case NotComparable(reason=reason):
                    found |= {name: _not_compared(name, reason) for name in [current, *remaining] if name}
                    current, remaining = "", {}
    return found


def _explained(found: LoaderLogits, used: Sequence[str]) -> LoaderLogits:
    """Return the result. If a known defect explains it, the result contains the defect's id."""
    if found.verdict not in ("differs", "raises"):
        return found
    explaining = (one.id for one in defects.known() if one.explains_file(found.loader, used, found.detail))
    return found.model_copy(update={"defect": next(explaining, "")})
