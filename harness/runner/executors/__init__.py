"""Find executors by name. An executor runs attempts. Its module in this package declares it by a constant EXECUTOR."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from harness.errors import UsageError
from harness.runner.executors.executor import Executor, ExecutorKind, ExecutorOption

Summary = tuple[str, str, ExecutorOption | None]
"""Name, help text and option of an executor."""


def kinds() -> dict[str, ExecutorKind]:
    """Map the name of each executor to its declaration."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    declared = (getattr(module, "EXECUTOR", None) for module in modules)
    return {kind.name: kind for kind in declared if kind is not None}


def summaries() -> list[Summary]:
    """Return the summary of every executor. Reads the source, because importing the executors would slow down `--help`."""
    return [
        _summary(node.value)
        for folder in __path__
        for file in sorted(Path(folder).glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXECUTOR"
        if isinstance(node.value, ast.Call)
    ]


def option_names() -> list[str]:
    """Return the names of the options of all executors."""
    return [option.name for _, _, option in summaries() if option]


def _summary(declaration: ast.Call) -> Summary:
    values = {str(keyword.arg): keyword.value for keyword in declaration.keywords}
    name = declaration.args[0] if declaration.args else values["name"]
    about, option = values.get("help"), values.get("option")
    return (
        ast.literal_eval(name),
        ast.literal_eval(about) if about else "",
        ExecutorOption(*map(ast.literal_eval, option.args)) if isinstance(option, ast.Call) else None,
    )


def choose(name: str, jobs: int | None = None, options: Mapping[str, Sequence[str]] | None = None) -> Executor:
    """Return the executor called `name`.

    jobs: number of Cells that run at a time; None for the executor's default. options: option name -> values. Raises
    UsageError if an option belongs to another executor.
    """
    found, given = kinds(), options or {}
    for kind in found.values():
        if kind.name != name and kind.option and (values := given.get(kind.option.name)):
            hint = f"leave it out, or add --executor {kind.name}"
            raise UsageError(f"is for --executor {kind.name}", where=f"--{kind.option.name} {values[0]}", hint=hint)
    option = found[name].option
    return found[name].make(jobs, given.get(option.name, ()) if option else ())


def end_orphans(folder: Path) -> None:
    """End Cells of the run in `folder` that still run although their runner was killed, whatever executor started them."""
    for kind in kinds().values():
        if kind.end_orphans:
            kind.end_orphans(folder)
