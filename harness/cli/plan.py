"""The command `plan`: validate a suite and list its Cells, without training."""

from __future__ import annotations

from functools import partial

import click

from harness.cli import options
from harness.console import print_note, terminal_width
from harness.errors import Exit, plural

_MOST = 40
"""Number of Cells that a terminal shows without `--all`."""


@options.only
@click.command(epilog="Example: peft-harness plan quick")
@click.argument("suite")
@click.option("--all", "every", is_flag=True, help=f"List all Cells. A terminal shows the first {_MOST} otherwise.")
@options.as_json
def plan(suite: str, only: str | None, every: bool, as_json: bool) -> Exit:
    """Validate a suite and list its Cells.

    Prints, for each Cell, the parameters that train, the predicted memory of training, and the time of its newest run.

    SUITE is a name (see `peft-harness list suites`) or a .yaml file. Nothing is trained. Parameters and memory are predicted
    from the shapes of the models that are on this machine. Times are those of the newest Records in results/runs. A Cell
    whose method refuses its config cannot run: it is listed with its line, and the exit code is 0 nevertheless.
    """
    from harness.report import plan_table
    from harness.suites import expand, loader, model_checks

    read = loader.load(suite)
    cells = expand.select(read.plan, only) if only is not None else read.plan
    model_checks.check_models(read, cells)
    print_note(f"predicting the memory of {plural(len(cells.cells), 'Cell')} ...")
    document = plan_table.planning(read, cells, predicted=plan_table.predictions(read, cells))
    most = None if every or terminal_width() is None else _MOST
    options.print_document(document, as_json, partial(plan_table.lines, most=most))
    return Exit.PASS
