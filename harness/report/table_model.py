"""Tables of the report. A table has columns and groups of rows. Sorting never moves a row to another group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from harness.analysis.run_facts import RunFacts
from harness.records.record import Cell, Measurements, Record
from harness.report import links
from harness.report.formatting import MIB, Field

Table = dict[str, Any]
Column = dict[str, Any]
_SCALES = {"MiB": 1 / MIB, "ms": 1e3, "MHz": 1e-6, "%": 100, "points": 100}
"""Unit of a column -> factor by which the values in base units are multiplied. Other units are base units."""


def column(label: str, title: str = "", *, number: bool = True, key: str = "") -> Column:
    """Return the head of a column.

    label: its heading; if the column has a unit, the heading ends in a comma and the unit. title: explanation of the
    column. key: name by which other code finds the column's fields; empty if no code needs them.
    """
    scale = _SCALES.get(label.rpartition(", ")[2], 1)
    return {"label": label, "title": title, "number": number, "key": key, "scale": scale}


def table(
    facts: RunFacts,
    key: str,
    caption: str,
    columns: list[Column],
    rows: Iterable[tuple[Cell, list[Field]]],
    *,
    notes: Sequence[str] = (),
    anchored: bool = False,
) -> Table:
    """Return a table of Cells, grouped by model and task. Groups and rows keep the order of `rows`.

    anchored: whether each row is the target of the links to its Cell.
    """
    groups: dict[str, list[Table]] = {}
    for cell, fields in rows:
        anchor = links.anchor(facts, cell.cell_id) if anchored else ""
        row = {**links.row(facts, cell), "fields": fields, "anchor": anchor}
        groups.setdefault(f"{cell.model} · {cell.task}", []).append(row)
    return grouped(
        f"{facts.prefix}{key}", caption, columns, groups.items(), file=f"{facts.run.manifest.run}-{key}", notes=notes
    )


def grouped(
    key: str,
    caption: str,
    columns: list[Column],
    groups: Iterable[tuple[str, list[Table]]],
    *,
    file: str,
    first: str = "Cell",
    by: str = "Model · task",
    notes: Sequence[str] = (),
) -> Table:
    """Return a table.

    groups: the title and the rows of each group; a group with an empty title has no row for its title. file: name of the
    CSV file, without the suffix. first: heading of the first column. by: what the titles of the groups are.
    """
    shown = [{"title": title, "rows": rows} for title, rows in groups]
    return {
        "id": key, "caption": caption, "file": file, "first": first, "by": by, "columns": columns, "groups": shown,
        "notes": list(notes),
    }  # fmt: skip


def by_key(columns: Sequence[Column], fields: Sequence[Field]) -> dict[str, Field]:
    """Map the key of each column to the field of a row in this column. Columns without a key are left out."""
    return {c["key"]: f for c, f in zip(columns, fields, strict=True) if c["key"]}


def measured(facts: RunFacts) -> list[tuple[Record, Measurements]]:
    """Return the Records with measurements, in the order of the manifest."""
    return [(r, r.measurements) for r in facts.latest.values() if r.measurements]
