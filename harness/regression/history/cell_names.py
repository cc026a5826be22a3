"""Names of the Cells in a history, and their selection by an expression."""

from __future__ import annotations

from pydantic import ValidationError

from harness.errors import UsageError
from harness.records import naming
from harness.records.record import Cell
from harness.regression.history.night_files import EVERY, History

COMMON = "all that this place measures"


def cells(history: History) -> dict[str, Cell]:
    """Return the Cells of a history, by cell_id. Leave out Cells that this version of the harness cannot parse."""
    found = {}
    for cell_id, fields in history.cells.items():
        try:
            cell = Cell.model_validate(fields)
        except ValidationError:
            continue
        if cell.cell_id == cell_id:
            found[cell_id] = cell
    return found


def names(history: History) -> dict[str, str]:
    """Return cell_id -> name for each Cell, and a name for `*`, which stands for all Cells on one machine."""
    return {**naming.full(cells(history).values()), EVERY: COMMON}


def select(history: History, expr: str, option: str = "--cell") -> frozenset[str]:
    """Return the cell_ids that an expression selects. Raises UsageError if it selects none.

    expr: an expression in the syntax of `--only`. option: the name of the command's option, for messages.
    """
    from harness.suites import expand

    known = cells(history)
    plan = expand.Plan(tuple(known.values()), dict.fromkeys(known, ""), ())
    try:
        selected = expand.select(plan, expr).cells
    except UsageError as error:
        raise UsageError(error.what, where=f"{option} {expr}", hint=error.hint, details=error.details) from error
    return frozenset(cell.cell_id for cell in selected)
