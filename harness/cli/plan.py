"""The command `plan`."""

from __future__ import annotations

import click

from harness.cli import options
from harness.console import print_note
from harness.errors import Exit, plural


@options.only
@click.command()
@click.argument("suite")
@options.as_json
def plan(suite: str, only: str | None, as_json: bool) -> Exit:
    """Validate a suite and list its Cells.

    SUITE is a name (see `peft-harness list suites`) or a .yaml file. Nothing is trained. Parameters and memory are predicted
    from the shapes of the models that are on this machine. The time of a Cell is that of its newest Record in results/runs.
    """
    from harness.report import plan_table
    from harness.suites import expand, loader, model_checks

    read = loader.load(suite)
    cells = expand.select(read.plan, only) if only is not None else read.plan
    model_checks.check_models(read, cells)
    print_note(f"predicting the memory of {plural(len(cells.cells), 'Cell')} ...")
    document = plan_table.planning(read, cells, predicted=plan_table.predictions(read, cells))
    options.print_document(document, as_json, plan_table.lines)
    return Exit.PASS
