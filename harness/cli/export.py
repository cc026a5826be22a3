"""The command `export`: write the numbers of runs as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import options
from harness.errors import Exit


@click.command(epilog="Example: peft-harness export latest --format csv")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--format", "form", type=options.Choice(["parquet", "csv"]), required=True, help="Format of the files.")
@click.option(
    "--out", type=options.PATH, metavar="DIR",
    help="Folder to write to; must be new or empty.  [default: export-FORMAT in the first run]",
)  # fmt: skip
def export(runs: tuple[str, ...], form: Any, out: Path | None) -> Exit:
    """Write the numbers of runs as tables.

    RUN is a folder, an id, the start of an id, or `latest`. Writes one file per table: cells, samples, items, checks, and
    columns, which describes the columns of the others. `harness.load` returns the same tables as pandas frames.

    \b
    Exit codes:
      1  a file was changed after its run, and left out
      4  a Record cannot be read or is missing
      5  there is nothing to export
    """
    from harness.report.export import write

    return write.export(runs, form, out)
