"""Executors by name. Each is a module of this package that declares EXECUTOR. It starts a worker for each attempt."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from harness.errors import UsageError
from harness.runner.executors.executor import Executor, ExecutorKind


def kinds() -> dict[str, ExecutorKind]:
    """Map the names of all executors to their declarations."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    declared = (getattr(module, "EXECUTOR", None) for module in modules)
    return {kind.name: kind for kind in declared if kind is not None}


def option_names() -> list[str]:
    """Return the names of all executors' options."""
    return [kind.option.name for kind in kinds().values() if kind.option]


def choose(name: str, jobs: int | None = None, options: Mapping[str, Sequence[str]] | None = None) -> Executor:
    """Return the executor called `name`. jobs: Cells at a time, None for its default; options: values by option name."""
    found, given = kinds(), options or {}
    for kind in found.values():
        if kind.name != name and kind.option and (values := given.get(kind.option.name)):
            hint = f"leave it out, or add --executor {kind.name}"
            raise UsageError(f"is for --executor {kind.name}", where=f"--{kind.option.name} {values[0]}", hint=hint)
    option = found[name].option
    return found[name].make(jobs, given.get(option.name, ()) if option else ())


def recall(folder: Path) -> None:
    """End the Cells that a killed runner of the run in `folder` has left running, with any executor."""
    for kind in kinds().values():
        if kind.recall:
            kind.recall(folder)
