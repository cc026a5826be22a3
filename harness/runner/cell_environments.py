"""Python environments for the Cells of a suite and for the model servers that the Cells start.

Before a run, missing environments of Cells are created, and missing environments of servers are not.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from harness.assets.environments import create, folder, table
from harness.assets.environments.packages import IndexOptions
from harness.errors import HarnessError
from harness.methods import servers
from harness.records.environment import code_version
from harness.records.record import Cell, Environment

_DESCRIBE = "from harness.records import environment as e; print(e.describe(e.threads()).model_dump_json())"


@dataclass(frozen=True)
class CellEnvironment:
    """A Python environment in which Cells run."""

    python: str
    """Path of the environment's interpreter."""
    described: Environment
    """The machine, and the versions of the software in this environment."""


def ensure(cells: Iterable[Cell], say: Callable[[str], None]) -> dict[str, CellEnvironment]:
    """Create the missing environments of Cells. Return a dict: value of `Cell.environment` -> environment.

    say: prints a line of progress. Raises UsageError for a version that does not exist, and HarnessError if an
    environment cannot be created or used.
    """
    known = {one.name: one.file.spec for one in folder.made() if one.is_current} | table.load()
    texts = dict.fromkeys(cell.environment for cell in cells if cell.environment)
    specs = {text: table.resolve(text, known) for text in texts}
    return {text: _described(create.ensure(spec, IndexOptions(), say).python) for text, spec in specs.items()}


def server_pythons(cells: Iterable[Cell]) -> dict[str, str]:
    """Return a dict that maps each model server in `Cell.serve` to the path of its interpreter.

    No environment is created. A server without an environment is left out, because it may be installed in the Python
    that runs the Cell.
    """
    known = {one.name: one.file.spec for one in folder.made() if one.is_current} | table.load()
    found: dict[str, str] = {}
    for name in dict.fromkeys(cell.serve for cell in cells if cell.serve):
        spec = known.get(servers.find(name).environment)
        if spec is not None and (made := folder.read(folder.place(spec))):
            found[name] = str(made.python)
    return found


def _described(python: object) -> CellEnvironment:
    command = [str(python), "-P", "-c", _DESCRIBE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        described = Environment.model_validate_json(done.stdout)
    except ValidationError as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HarnessError(f"the harness does not run there: {last}", where=str(python), hint="remove it") from error
    if described.code_version != code_version():
        hint = "install the harness, e.g. by `pip install -e .`, and remove the environment: `peft-harness env remove`"
        raise HarnessError("this environment runs other code of the harness", where=str(python), hint=hint)
    return CellEnvironment(str(python), described)
