"""pandas frames with the numbers of runs: `harness.load`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from harness.records import naming, store
from harness.records.record import Record
from harness.report.export import rows
from harness.report.export.columns import BOOLEAN, FLOAT, INTEGER, TABLES, TEXT, TIME, Column, columns
from harness.report.export.rows import ExportRow, Value

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Numbers:
    """Numbers of one or several runs. Join the tables on `run`, `cell_id` and `attempt`. Missing values are NA."""

    cells: DataFrame
    """One row per attempt at a Cell. The column `latest` marks the last attempt at each Cell."""
    samples: DataFrame
    """One row per raw sample of the training, of a latency or of a model server."""
    items: DataFrame
    """One row per scored test item."""
    checks: DataFrame
    """One row per check."""
    columns: DataFrame
    """One row per column of each table: its dtype, unit (`s`, `B`, `1`) and meaning."""
    left_out: tuple[str, ...] = ()
    """One sentence for each file that is not used, e.g. since it was changed, and for each Cell without a Record."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in TABLES)
        return f"<{counts}{f'; {len(self.left_out)} left out, see .left_out' if self.left_out else ''}>"


def load(run: str | Path, *more: str | Path) -> Numbers:
    """Load the numbers of one or several runs. A run is given as a folder, an id, the start of an id, or `latest`.

    A file that is torn or was changed after its run is left out with a warning, and `left_out` names it. Raises
    UsageError if a run does not exist. Raises StoreError if a run.json is unreadable.
    """
    numbers = of([store.read_run(store.find_run(str(name))) for name in (run, *more)])
    for what in numbers.left_out:
        warnings.warn(f"left out: {what}", stacklevel=2)
    return numbers


def of(runs: Sequence[store.Run]) -> Numbers:
    """Return the numbers of runs read from disk. A Record that occurs twice, e.g. in a copied folder, counts once."""
    found: dict[tuple[str, str], Record] = {}
    newest: dict[tuple[str, str], int] = {}
    left_out: list[str] = []
    for run in runs:
        left_out += _left_out(run)
        for record in sorted(run.records, key=_place(run)):
            if found.setdefault((record.run, record.id), record) != record:
                left_out.append(f"{run.path}: Record {record.id} differs from the one in another folder of this run")
        for record in run.latest().values():
            newest[_cell(record)] = max(record.attempt, newest.get(_cell(record), 0))
    names = naming.recipes(record.cell for record in found.values())
    made: dict[str, list[ExportRow]] = {table: [] for table in TABLES}
    for record in found.values():
        latest = newest.get(_cell(record)) == record.attempt
        made["cells"].append(rows.cell(record, names[record.cell.recipe_id], latest=latest))
        made["samples"] += rows.samples(record)
        made["items"] += rows.items(record)
        made["checks"] += rows.checks(record)
    frames = {table: _frame(table, its_rows) for table, its_rows in made.items()}
    described = [
        (table, c.name, str(frame.dtypes[c.name]), c.unit or None, c.meaning)
        for table, (frame, declared) in frames.items()
        for c in declared
    ]
    return Numbers(
        **{table: frame for table, (frame, _) in frames.items()},
        columns=pd.DataFrame(described, columns=["table", "column", "dtype", "unit", "meaning"], dtype=TEXT),
        left_out=tuple(dict.fromkeys(left_out)),
    )


def _cell(record: Record) -> tuple[str, str]:
    return record.run, record.cell_id


def _left_out(run: store.Run) -> list[str]:
    names = naming.full(run.manifest.cells)
    sentences = [f"{name} {what}, and does not count" for name, what in (run.changed | run.ungated).items()]
    sentences += [f"{name} cannot be read: {why}" for name, why in run.broken.items()]
    sentences += [f"{names[i]} ({i}) has no Record" for i in run.missing()]
    return [f"{run.path}: {sentence}" for sentence in sentences]


def _place(run: store.Run) -> Callable[[Record], tuple[int, int]]:
    """Return a sort key for Records: the order of the Cells in the suite, then the attempt."""
    places = {cell.cell_id: place for place, cell in enumerate(run.manifest.cells)}
    return lambda record: (places.get(record.cell_id, len(places)), record.attempt)


def _frame(table: str, made: Sequence[ExportRow]) -> tuple[DataFrame, list[Column]]:
    """Return the frame of a table, and the columns of the frame. made: the rows of the table."""
    names = list(dict.fromkeys(name for row in made for name in row))
    declared = columns(table, names)
    arrays = {c.name: _array([row.get(c.name) for row in made], c.dtype) for c in declared}
    return pd.DataFrame(arrays, index=pd.RangeIndex(len(made))), declared


def _array(values: list[Value], dtype: str) -> Any:
    """Return an array of this dtype for pandas. None and an empty text become NA.

    A Record has an empty text where no text applies.
    """
    given = [None if value == "" else value for value in values]
    if dtype == TIME:
        return pd.to_datetime(pd.Series(given, dtype=TEXT), utc=True, errors="coerce", format="ISO8601").astype(TIME)
    dtype = dtype or _kind(given)
    if dtype == INTEGER and any(isinstance(value, int) and value.bit_length() > 63 for value in given):
        dtype = TEXT  # 64 bits cannot hold the number, e.g. a seed; a text keeps it exact
    if dtype == TEXT:
        given = [value if value is None or isinstance(value, str) else json.dumps(value) for value in given]
    return pd.array(given, dtype=dtype)


def _kind(given: Iterable[Value]) -> str:
    """Return the narrowest dtype that holds all values of one config key exactly; text for mixed types."""
    types = {type(value) for value in given if value is not None}
    if types == {bool}:
        return BOOLEAN
    if types == {int}:
        return INTEGER
    return FLOAT if types in ({float}, {int, float}) else TEXT
