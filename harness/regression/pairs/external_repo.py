"""Find the packages in the repository of a plug-in, and the Cells that run these packages.

Two revisions of a plug-in are compared only in the Python code of the plug-in's package. The harness builds and
installs nothing for a revision. Both revisions import the other packages and the compiled code that Python finds on its
path.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError, UsageError
from harness.methods.registry import GROUP, Registry, entry_points_by_name
from harness.records.record import Cell
from harness.regression import git

_PROBE = """
import json, sys
from importlib.metadata import entry_points
from importlib.util import find_spec
found = {}
for point in entry_points(group=sys.argv[1]):
    package = point.module.partition(".")[0]
    spec = find_spec(package)
    found[package] = list(spec.submodule_search_locations or [spec.origin]) if spec else []
print(json.dumps(found))
"""
_PATIENCE_S = 60


@dataclass(frozen=True)
class ExternalRepo:
    """A folder with Python packages inside a git checkout."""

    top: Path
    """Top folder of the checkout."""
    inside: Path
    """Path of the folder with the packages, relative to `top`."""

    def code(self, tree: Path) -> Path:
        """Return the folder of a checkout at `tree` to put on Python's path: `inside`, or `inside`/src if it exists."""
        folder = tree / self.inside
        return folder / "src" if (folder / "src").is_dir() else folder


def find(folder: Path) -> ExternalRepo:
    """Return the repository of a folder. Raises UsageError if the folder is not in a git checkout."""
    done = git.run(folder, "rev-parse", "--show-toplevel")
    if done.returncode:
        what = f"{folder} is in no git checkout" if folder.is_dir() else f"{folder} is no folder"
        raise UsageError(what, where="--repo", hint="name the folder that holds your package, or its `src`")
    top = Path(done.stdout.strip()).resolve()
    return ExternalRepo(top, folder.resolve().relative_to(top))


def packages(label: str, code: Path, variables: Mapping[str, str]) -> frozenset[str]:
    """Return the packages of plug-ins that Python imports from `code`, the folder of a side (old or new).

    label: name of the side in messages. variables: environment variables of the processes that will run the side.
    Raises HarnessError if there is no such package, since both sides would then run the installed package.
    """
    found = _imported(label, code, variables)
    top = code.resolve()
    inside = {
        name
        for name, folders in found.items()
        if folders and all(Path(folder).resolve().is_relative_to(top) for folder in folders)
    }
    if inside:
        return frozenset(inside)
    others = ", ".join(f"{name} from {folders[0] if folders else 'nowhere'}" for name, folders in found.items())
    what = f"{label} holds no package of an installed plug-in; Python would import: {others or 'none'}"
    hint = f"name the folder that holds the package, and install its entry point (`{GROUP}`), e.g. by `pip install -e`"
    raise HarnessError(what, where=f"--repo, {code}", hint=hint)


def _imported(label: str, code: Path, variables: Mapping[str, str]) -> dict[str, list[str]]:
    """Return package -> folders from which Python imports it, for each package of a plug-in except `harness`.

    label: name of the side in messages. variables: environment variables, with `code` first on Python's path.
    """
    command, why = [sys.executable, "-P", "-c", _PROBE, GROUP], f"no answer within {_PATIENCE_S} s"
    with contextlib.suppress(subprocess.TimeoutExpired, ValueError, IndexError):
        done = subprocess.run(
            command, env=dict(variables), capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
        why = [f"no answer, exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
        found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])  # other code may have printed before
        found.pop("harness", None)
        return found
    hint = f"start Python with {code} first in PYTHONPATH, and list `importlib.metadata.entry_points()`"
    raise HarnessError(f"the plug-ins of {label} cannot be listed: {why}", where=f"--repo, {code}", hint=hint)


def uses(cell: Cell, registry: Registry, packages: frozenset[str]) -> bool:
    """Return whether one of these packages implements the Method or the base of a Cell."""
    keys = [("method", cell.method, cell.implementation), ("base", cell.base.quantization, cell.base.implementation)]
    points = {(i.kind, i.target, i.name): i.point for i in registry.implementations}
    entry_points = entry_points_by_name()
    modules = [entry_points[points[key]].module for key in keys if key in points and points[key] in entry_points]
    return any(module.partition(".")[0] in packages for module in modules)
