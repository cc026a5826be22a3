"""Executors by name. Each is one module of this package that declares EXECUTOR, and starts the worker once per attempt."""

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
    """Return the executor of that name. jobs: Cells at a time, None as it sees fit; options: values by option name."""
    found = kinds()
    for kind in found.values():
        values = (options or {}).get(kind.option.name, ()) if kind.option else ()
        if values and kind.option and kind.name != name:
            raise UsageError(
                f"is for --executor {kind.name}",
                where=f"--{kind.option.name} {values[0]}",
                hint=f"leave it out, or add --executor {kind.name}",
            )
    option = found[name].option
    return found[name].make(jobs, (options or {}).get(option.name, ()) if option else ())


def recall(folder: Path) -> None:
    """End the Cells that a killed runner of the run in `folder` left behind, by any executor."""
    for kind in kinds().values():
        kind.recall(folder)
