"""The command `doctor`: show what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import click

from harness.cli import options
from harness.errors import Exit


@click.command()
@click.option("--verbose", "-v", is_flag=True, help="List every finding, also those that are fine.")
@options.as_json
def doctor(verbose: bool, as_json: bool) -> Exit:
    """Show what this machine can run, and why it cannot run the rest.

    Looks at the processor, the GPU, the installed libraries, the implementations, the models and data of the suite quick,
    and the free disk space. Exits with 4 if something that the suite quick needs is missing.
    """
    from harness.cli import diagnosis

    return diagnosis.report(as_json, verbose)
