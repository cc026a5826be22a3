"""The commands `env create`, `list`, `remove` and `repair`: manage environments for libraries that conflict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from harness.cli import options
from harness.errors import Exit

if TYPE_CHECKING:
    from harness.assets.environments.packages import IndexOptions

_C = TypeVar("_C", bound=Callable[..., Any])


def index_options(command: _C) -> _C:
    """Add `--offline` and `--find-links` to a command."""
    command = click.option(
        "--find-links", multiple=True, metavar="FOLDER", help=f"Folder or page with wheels. {options.AGAIN}"
    )(command)
    return click.option("--offline", is_flag=True, help="Use no package index, only --find-links.")(command)


def index(offline: bool, find_links: tuple[str, ...]) -> IndexOptions:
    """Return the values of the options that `index_options` adds."""
    from harness.assets.environments.packages import IndexOptions

    return IndexOptions(offline, find_links)


@click.group()
def env() -> None:
    """Environments for libraries that cannot share one Python.

    An environment holds other versions of libraries, or libraries that conflict with others. `check` runs implementations
    in it. pip resolves and downloads packages with your index and proxy settings. uv installs them if it is on the path,
    otherwise pip does.
    """


@env.command("create")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--with", "requirement", metavar="REQUIREMENT", help="Library and version to install, e.g. peft==0.19.1.")
@click.option(
    "--file", "file", type=options.FILE, metavar="FILE", help="Table of environments, like suites/environments.yaml."
)
@click.option("--dry-run", is_flag=True, help="Only print what would be downloaded, and its size.")
@index_options
def create(
    name: str | None, requirement: str | None, file: Path | None, dry_run: bool, offline: bool, find_links: tuple[str, ...]
) -> Exit:  # fmt: skip
    """Make the environment called NAME in the table of environments, or one for the requirement of --with."""
    from harness.cli import environments

    return environments.create(name, requirement, file, dry_run, index(offline, find_links))


@env.command("list")
@options.as_json
def list_(as_json: bool) -> Exit:
    """List the environments that exist, and those that could be made."""
    from harness.cli import environments

    return environments.list_(as_json)


@env.command("remove", epilog="Example: peft-harness env remove torchao")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: tuple[str, ...]) -> Exit:
    """Remove environments, and everything in them."""
    from harness.cli import environments

    return environments.remove(names)


@env.command("repair", epilog="Example: peft-harness env repair torchao")
@click.argument("name")
@index_options
def repair(name: str, offline: bool, find_links: tuple[str, ...]) -> Exit:
    """Verify every file of an environment. If it is damaged, make it again from the same packages."""
    from harness.cli import environments

    return environments.repair(name, index(offline, find_links))
