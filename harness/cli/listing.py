"""The command `list`: print the names that suites and commands take."""

from __future__ import annotations

import click

from harness.cli import options
from harness.errors import Exit

KINDS = (
    "methods",
    "bases",
    "operations",
    "implementations",
    "suites",
    "models",
    "tasks",
    "checks",
    "claims",
    "measures",
)


@click.command("list")
@click.argument("kinds", nargs=-1, type=options.Choice(KINDS), metavar="[KIND]...")
@options.as_json
def list_(kinds: tuple[str, ...], as_json: bool) -> Exit:
    """List the names that suites and commands take.

    KIND is methods, operations, implementations, suites, models, tasks, checks, claims or measures. Without it, prints the
    names of all kinds. `peft-harness explain NAME` describes one of them.
    """
    from harness.cli import catalog

    document = catalog.listing(kinds)
    lines = catalog.lines if kinds else catalog.overview
    options.print_document(document, as_json, lines)
    return Exit.PASS
