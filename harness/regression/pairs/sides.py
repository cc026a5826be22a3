"""Sides of a comparison (two revisions of a checkout, or two implementations), and how a side runs a Cell."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import resources
from harness.errors import HarnessError, UsageError, did_you_mean
from harness.methods.registry import discover
from harness.process import lifeline
from harness.process.supervisor import Subprocess
from harness.records import environment, store
from harness.records.record import Cell, Record
from harness.regression import git
from harness.regression.pairs import external_repo
from harness.suites.expand import Plan

_PATIENCE_S = 15.0
"""Seconds that a terminated run gets to kill its worker and write its footer."""
HERE = "."
"""Name that stands for the checkout as it is, including uncommitted changes."""


@dataclass(frozen=True)
class Side:
    """One side (old or new) of a comparison: the code that its processes run, and their environment variables."""

    label: str
    """Name of the side in messages."""
    code: Path | None = None
    """Folder that comes first on Python's path, with another revision of `harness` or of a plug-in's package. If None,
    the side runs the installed code."""
    metadata: Path | None = None
    """Folder with the entry points that a checked-out revision declares; None if it declares none. The installed entry
    points may name modules that the revision lacks."""
    implementation: str | None = None
    """Implementation of the Cells to run. None if the sides are revisions."""
    packages: frozenset[str] | None = None
    """Packages that implement the Cells to run, if the sides are revisions of a plug-in. Otherwise None."""
    variables: tuple[str, ...] = ()
    """Environment variables of the side's processes, each NAME=VALUE."""

    def with_variables(self, variables: Sequence[str]) -> Side:
        """Return a copy of this side with environment variables. The label of the copy names them."""
        label = f"{self.label} with {' '.join(variables)}" if variables else self.label
        return replace(self, label=label, variables=tuple(variables))


@dataclass(frozen=True)
class CellPair:
    """Two Cells to compare, one from each side."""

    name: str
    """Common name of both Cells."""
    old: Cell
    new: Cell


@contextlib.contextmanager
def opened(old: str, new: str, plan: Plan, repo: Path | None = None) -> Iterator[tuple[Side, Side]]:
    """Yield the two sides of a comparison. When the context ends, checked-out revisions are removed.

    old, new: two implementations of the suite's Cells, or two revisions. repo: a folder in the checkout of a plug-in.
    With `repo`, `old` and `new` are revisions of the plug-in, and the installed harness runs them. Raises UsageError if
    a name is unknown, if an implementation is compared with a revision, or if `repo` is not in a git checkout. Raises
    HarnessError if a revision of a plug-in lacks its package.
    """
    if repo is not None:
        external = external_repo.find(repo)
        with _revisions(external.top, old, new, external.code) as sides:
            of_sides = [external_repo.packages(s.label, s.code or external.top, _variables(s)) for s in sides]
            first, second = (replace(side, packages=of_sides[0] & of_sides[1]) for side in sides)
            yield first, second
        return
    known = sorted({cell.implementation for cell in plan.cells})
    named = [name for name in (old, new) if name in known]
    if len(named) == 2:
        yield Side(f"implementation {old}", implementation=old), Side(f"implementation {new}", implementation=new)
        return
    if named:
        other = new if old == named[0] else old
        what = f"`{named[0]}` is an implementation of this suite's Cells, and `{other}` is not"
        raise UsageError(what, where="--pairs", hint=did_you_mean(other, known, "implementations"))
    top = resources.checkout()
    if top is None:
        what = f"`{old}` and `{new}` are no implementations of this suite's Cells; revisions need a checkout with git"
        raise UsageError(what, where="--pairs", hint=f"name two of {', '.join(known)}, or run from a checkout")
    with _revisions(top, old, new, known=known) as sides:
        yield sides


@contextlib.contextmanager
def _revisions(
    top: Path, old: str, new: str, code: Callable[[Path], Path] = Path, known: Sequence[str] = ()
) -> Iterator[tuple[Side, Side]]:
    """Check out two revisions, and yield them as sides.

    code: function that returns, for the folder of a checkout, the folder to put on Python's path. known: names of
    implementations for hints.
    """
    trees: dict[str, Path] = {HERE: top}
    commits = [name if name == HERE else _commit(top, name, known) for name in (old, new)]
    with contextlib.ExitStack() as stack:
        for commit in commits:
            if commit not in trees:
                trees[commit] = stack.enter_context(_checked_out(top, commit))
        first, second = (Side(_label(top, commit), code(trees[commit]), _metadata(trees[commit])) for commit in commits)
        yield first, second


def pairs(plan: Plan, names: dict[str, str], sides: tuple[Side, Side]) -> list[CellPair]:
    """Return the pairs of Cells to compare.

    If the sides are implementations, each Cell of the old one is paired with the Cell of the new one that is equal in
    all other fields. If the sides are revisions, each Cell is paired with itself; for revisions of a plug-in, only the
    Cells that it implements. names: names of the Cells, by cell_id. Raises UsageError if there is no pair.
    """
    old, new = (side.implementation for side in sides)
    if (packages := sides[0].packages) is not None:
        registry = discover()
        mine = [cell for cell in plan.cells if external_repo.uses(cell, registry, packages)]
        if not mine:
            what = f"no Cell of this suite is computed by {', '.join(sorted(packages))}"
            hint = "choose a --suite that has Cells with an implementation of that package"
            raise UsageError(what, where="--repo", hint=hint)
        return [CellPair(names[cell.cell_id], cell, cell) for cell in mine]
    if old is None or new is None:
        return [CellPair(names[cell.cell_id], cell, cell) for cell in plan.cells]
    by_rest = {_rest(cell): cell for cell in plan.cells if cell.implementation == new}
    old_cells = [cell for cell in plan.cells if cell.implementation == old and _rest(cell) in by_rest]
    if not old_cells:
        hint = f"write `implementation: [{old}, {new}]` in the suite, or choose other Cells by --only"
        raise UsageError(f"no Cell of {old} has an otherwise equal Cell of {new}", where="--pairs", hint=hint)
    return [CellPair(names[cell.cell_id], cell, by_rest[_rest(cell)]) for cell in old_cells]


def run(side: Side, suite: Path, cell: Cell, folder: Path, options: Sequence[str] = ()) -> Record:
    """Run one Cell with the code of a side, by `peft-harness run` in a new process, and return the Record.

    folder: the run folder to create. options: further options of the command. Raises HarnessError if the process leaves
    no Record.
    """
    command = [
        sys.executable, "-P", "-m", "harness.cli", "run", str(suite.resolve()), "--only", cell.cell_id, "--out",
        str(folder), *options,
    ]  # fmt: skip
    variables = _variables(side)
    if options[:2] != ("--device", "cpu") and "CUDA_VISIBLE_DEVICES" not in variables and (cards := environment.gpus()):
        variables["CUDA_VISIBLE_DEVICES"] = cards[0].partition(",")[0]  # both sides must use the same card
    code, error = _ran(command, variables)
    records = store.read_run(folder).records if (folder / "run.json").is_file() else []
    if not records:
        last_lines = " ".join(error.strip().splitlines()[-3:])
        what = f"{side.label} gave no Record of {cell.label} (exit code {code}): {last_lines}"
        raise HarnessError(what, where=str(folder), hint=f"run `{' '.join(command[3:])}` there")
    return records[-1]


def _variables(side: Side) -> dict[str, str]:
    variables = dict(os.environ)
    if side.code is not None:
        first = [str(path) for path in (side.metadata, side.code) if path is not None]
        variables["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
    return variables | dict(variable.split("=", 1) for variable in side.variables)


def _ran(command: Sequence[str], variables: dict[str, str]) -> tuple[int | None, str]:
    """Run a command, and return its exit code and stderr.

    If this process is terminated, the command gets time to end cleanly. If this process is killed, a script of the
    installed harness kills the command. (An old revision may lack this script.)
    """
    script = [sys.executable, "-I", "-S", lifeline.__file__]
    with Subprocess(
        script, command, environment=variables, lifeline=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        try:
            code = child.wait()
        except BaseException:
            child.terminate(_PATIENCE_S)
            raise
    return code, child.output


def _rest(cell: Cell) -> str:
    """Return a hash of all fields of a Cell except its implementation."""
    return cell.model_copy(update={"implementation": ""}).cell_id


def _commit(top: Path, name: str, known: Sequence[str]) -> str:
    # Without `--end-of-options`, git would read a name that begins with a dash as an option.
    found = git.run(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if found.returncode:
        what, hint = f"`{name}` is not a revision of {top}", "name "
        if known:
            what = f"`{name}` is neither a revision of {top} nor an implementation of this suite's Cells"
            hint = f"name two of {', '.join(known)}; or "
        hint += f"commits, branches, tags, or `{HERE}` for the checkout as it stands"
        raise UsageError(what, where="--pairs", hint=hint)
    return found.stdout.strip()


def _label(top: Path, commit: str) -> str:
    if commit != HERE:
        return f"revision {commit[:12]}"
    changed = git.run(top, "status", "--porcelain", "-uno").stdout.strip()
    return "the checkout as it stands" + (", with uncommitted changes" if changed else "")


@contextlib.contextmanager
def _checked_out(top: Path, commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="peft-harness-") as folder:
        tree = Path(folder) / commit[:12]
        added = git.run(top, "worktree", "add", "--detach", str(tree), commit)
        if added.returncode:
            what = f"git cannot check {commit[:12]} out: {added.stderr.strip()}"
            raise HarnessError(
                what, where=str(top), hint="run `git worktree list`, and remove stale worktrees by `git worktree prune`"
            )
        try:
            _write_metadata(tree)
            yield tree
        finally:
            with contextlib.suppress(HarnessError):  # the pairs are measured; git forgets a missing worktree by itself
                git.run(top, "worktree", "remove", "--force", str(tree))


def _metadata(tree: Path) -> Path | None:
    folder = tree.with_name(f"{tree.name}.metadata")
    return folder if folder.is_dir() else None


def _installed(distribution: str) -> str:
    """Return the installed version of a distribution, or "0" if it is not installed.

    This version is used if the version in pyproject.toml is `dynamic`.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _write_metadata(tree: Path) -> None:
    """Write the entry points that a checked-out revision declares to a metadata folder next to the checkout.

    If pyproject.toml declares none, write nothing.
    """
    file = tree / "pyproject.toml"
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}) if file.is_file() else {}
    except ValueError as error:
        what = f"pyproject.toml of revision {tree.name} is no valid TOML: {error}"
        raise HarnessError(
            what, where="--pairs", hint="name another revision, or correct the file and commit it"
        ) from error
    name, groups = project.get("name", ""), project.get("entry-points", {})
    if not name or not groups:
        return
    version = project.get("version") or _installed(name)
    info = tree.with_name(f"{tree.name}.metadata") / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    sections = [
        "\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in points.items())]) for group, points in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections) + "\n", encoding="utf-8")
