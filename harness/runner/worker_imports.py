"""List the modules that a Cell needs. A worker imports them before it measures. This module imports no torch."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from harness.assets import model_folder
from harness.cell.job import Job
from harness.methods.registry import OWN_DISTRIBUTION, Registry, discover, entry_points_by_name
from harness.records.record import Cell


def modules(job: Job, registry: Registry) -> list[str]:
    """Return the modules that the implementations of a Cell and its model need."""
    cell = job.cell
    needed = list(registry.find("method", cell.method, cell.implementation).requires)
    if cell.base.quantization != "none":
        needed += registry.find("base", cell.base.quantization, cell.base.implementation).requires
    return needed + _always(job)


def registry(cell: Cell) -> Registry:
    """Return a registry with the implementations that a Cell needs.

    If the harness itself offers all of them, the registry has only the harness's own implementations. A fork inherits
    these. Otherwise it has those of all plug-ins.
    """
    base, own = cell.base, own_registry()
    needed = [("method", cell.method, cell.implementation)]
    needed += [("base", base.quantization, base.implementation)] if base.quantization != "none" else []
    offered = {(one.kind, one.target, one.name) for one in own.implementations}
    return own if offered.issuperset(needed) else discover()


def shared(job: Job) -> list[str]:
    """Return the modules that a fork server imports for a Cell, including the transformers module of its model type.

    Only the worker imports plug-ins of other distributions. A plug-in could start threads, which a fork would lack.
    """
    cell, own = job.cell, own_registry()
    offered = [
        one.requires
        for one in own.implementations
        if (one.kind, one.target, one.name)
        in (
            ("method", cell.method, cell.implementation),
            ("base", cell.base.quantization, cell.base.implementation),
        )
    ]
    model_type = model_folder.model_type(Path(job.model.path))
    classes = [f"transformers.models.{model_type}.modeling_{model_type}"] if model_type.isidentifier() else []
    return sorted({module for requires in offered for module in requires} | {*_always(job), *classes})


def _always(job: Job) -> list[str]:
    # Not `transformers`, which delays its own imports until the first model.
    return [
        "transformers.modeling_utils",
        "transformers.models.auto.tokenization_auto",
        *(["lm_eval.evaluator"] if job.model.source.kind == "causal" and job.data else []),
    ]


def compile_name_patterns() -> None:
    """Let transformers compile its table of a thousand patterns for names of weights. Every model needs the table."""
    with contextlib.suppress(Exception):  # it is only a cache: if something is wrong, the load of the model reports it
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("")


@functools.cache
def own_registry() -> Registry:
    """Return a registry that has only the implementations of the harness itself."""
    points = entry_points_by_name()
    return discover(
        [name for name, point in points.items() if point.dist is not None and point.dist.name == OWN_DISTRIBUTION]
    )
