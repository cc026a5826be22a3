"""Run the commands of the group `env`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.assets import cache
from harness.assets.environments import create as creation
from harness.assets.environments import folder, table
from harness.assets.environments.folder import MadeEnvironment
from harness.assets.environments.packages import IndexOptions
from harness.cli import options
from harness.console import align_columns, print_lines, print_note, without_code_marks
from harness.errors import Exit, HarnessError, UsageError, did_you_mean, first_names, plural
from harness.process.signals import handle_termination


def create(name: str | None, requirement: str | None, file: Path | None, dry_run: bool, index: IndexOptions) -> Exit:
    """Make an environment and print its path. dry_run: only print what would be downloaded."""
    if (name is None) == (requirement is None):
        hint = "write one of the two; `peft-harness env list` shows the names"
        raise UsageError("needs a NAME or --with", where="env create", hint=hint)
    known = table.load(file)
    spec = table.of_requirement(requirement) if requirement is not None else table.resolve(name or "", known)
    with _interruption(f"environment {spec.name} was not made"):
        if dry_run:
            creation.announce(spec, index, print_note)
            return Exit.PASS
        made = creation.ensure(spec, index, print_note)
    print_lines([f"{made.name}: {made.label}, {_size(made)}, {made.folder}"])
    return Exit.PASS


def ensure_all(texts: Sequence[str], index: IndexOptions) -> list[MadeEnvironment]:
    """Return the environments for names or requirements, in order and without duplicates. Make those that do not exist.

    texts: requirements or names of environments; a name may come from a user's file. All texts are checked before
    anything is made. Raises UsageError for an unknown name or version, and for two environments with the same versions.
    """
    known = {one.name: one.file.spec for one in folder.made() if one.is_current} | table.load()
    specs = [table.resolve(text, known) for text in texts]
    made = list({one.folder: one for one in (creation.ensure(spec, index, print_note) for spec in specs)}.values())
    labels = [one.label for one in made]
    if twice := next((label for label in labels if labels.count(label) > 1), ""):
        names = ", ".join(one.name for one in made if one.label == twice)
        raise UsageError(
            f"the environments {names} hold the same versions: {twice}", where="--with", hint="keep one of them"
        )
    return made


def list_(as_json: bool) -> Exit:
    """Print the environments that exist, and those that could be made."""
    cache.sweep()
    made = folder.made()
    names = {one.name for one in made if one.is_current}
    possible = [spec for spec in table.load().values() if spec.name not in names]
    document = {
        "schema": 1,
        "environments": [
            {"name": one.name, "folder": str(one.folder), "current": one.is_current, **one.file.model_dump(mode="json")}
            for one in made
        ],
        "possible": [spec.model_dump(mode="json") for spec in possible],
    }
    options.print_document(document, as_json, lambda _: _lines(made, possible))
    return Exit.PASS


def _lines(made: Sequence[MadeEnvironment], possible: Sequence[table.EnvironmentSpec]) -> list[str]:
    rows = [[one.name, one.label, _size(one), one.file.made[:10], _state(one)] for one in made]
    lines = align_columns([["environment", "versions", "size", "made", ""], *rows], indent="") if rows else []
    if made:
        total = sum(one.file.size for one in made)
        free = f"{folder.free() / 1e9:,.1f} GB free at {folder.root()}"
        lines.append(f"{plural(len(made), 'environment')}, {total / 1e6:,.1f} MB, {free}")
    else:
        lines.append("no environment exists yet")
    if possible:
        lines += ["", "can be made by `peft-harness env create NAME`:"]
        lines += align_columns(
            [[one.name, first_names(one.requirements, 1), without_code_marks(one.about)] for one in possible]
        )
    return lines


def _state(environment: MadeEnvironment) -> str:
    return "" if environment.is_current else "of another Python or other libraries"


def remove(names: Sequence[str]) -> Exit:
    """Remove all environments with these names, including those that another Python made."""
    for environment in [one for name in dict.fromkeys(names) for one in _named(name)]:
        folder.remove(environment)
        print_lines([f"removed {environment.name}: {_size(environment)}"])
    return Exit.PASS


def repair(name: str, index: IndexOptions) -> Exit:
    """Verify an environment, make it again if it is damaged, and print what was wrong."""
    *_, environment = sorted(_named(name), key=lambda one: one.is_current)
    if not environment.is_current:
        hint = f"`peft-harness env remove {name}` and `peft-harness env create`, or repair it with its own Python"
        raise UsageError(f"another Python or torch made the environment {name!r}", hint=hint)
    with _interruption(f"environment {name} is as it was"):
        wrong = creation.repair(environment, index, print_note)
    print_lines([f"{name}: {one}" for one in wrong] + [f"{name}: {'repaired' if wrong else 'no damage found'}"])
    return Exit.PASS


@contextmanager
def _interruption(state: str) -> Iterator[None]:
    """Turn Ctrl-C or SIGTERM inside the context into a HarnessError.

    state: state of the environment, for the error message.
    """
    try:
        with handle_termination():
            yield
    except KeyboardInterrupt:
        raise HarnessError(f"interrupted: {state}", hint="nothing new is left of it; repeat the command") from None


def _named(name: str) -> list[MadeEnvironment]:
    """Return the environments that have this name. Raises UsageError if there are none."""
    made = folder.made()
    if found := [one for one in made if one.name == name]:
        return found
    known = dict.fromkeys(one.name for one in made)
    hint = did_you_mean(name, known, "there are") if made else "`peft-harness env list` shows which ones could be made"
    raise UsageError(f"there is no environment {name!r}", hint=hint)


def _size(environment: MadeEnvironment) -> str:
    return f"{environment.file.size / 1e6:,.1f} MB"
