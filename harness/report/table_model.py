"""Tables of the report. A table has columns and groups of rows. Sorting never moves a row to another group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from harness.analysis.grouping import group
from harness.analysis.run_facts import RunFacts
from harness.errors import plural
from harness.records.record import Cell, Measurements, Record
from harness.report import links
from harness.report.formatting import MIB, Field

Table = dict[str, Any]
Column = dict[str, Any]
_SCALES = {"MiB": 1 / MIB, "ms": 1e3, "MHz": 1e-6, "%": 100, "points": 100}
"""Unit of a column -> factor from the base unit to it. Other units are base units."""
_REASONS = 2
"""Largest number of reasons for missing numbers that a remark below a table lists."""
STATIC = 200
"""Largest number of Cells in a run whose tables the page contains as HTML. For a larger run, the page contains the rows
as data, and its script makes the rows of a table when a reader opens the table."""


def column(label: str, title: str = "", *, number: bool = True, key: str = "", shown: bool = True) -> Column:
    """Return the head of a column.

    label: its heading, e.g. `Peak, MiB`: a unit follows a comma at the end. title: explanation of the column. number:
    True for a column of numbers. key: name by which other code finds the column's fields; empty if no code needs them.
    shown: False to hide the column until the reader selects it; it then needs a key.
    """
    scale = _SCALES.get(label.rpartition(", ")[2], 1)
    return {"label": label, "title": title, "number": number, "key": key, "scale": scale, "shown": shown}


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

    key: end of the HTML id and of the name of the CSV file. anchored: True if links to a Cell lead to its row in this
    table.
    """
    groups: dict[str, list[Table]] = {}
    for cell, fields in rows:
        anchor = links.anchor(facts, cell.cell_id) if anchored else ""
        row = {
            **links.row(facts, cell),
            "fields": fields,
            "anchor": anchor,
            "facets": _facets(facts, cell) if anchored else {},
        }
        groups.setdefault(f"{cell.model} · {cell.task}", []).append(row)
    made = grouped(
        f"{facts.prefix}{key}", caption, columns, groups.items(), file=f"{facts.run.manifest.run}-{key}", notes=notes
    )
    every = [row for group in groups.values() for row in group]
    return made | {"facets": facets(every), "stored": len(every) if len(facts.run.manifest.cells) > STATIC else 0}


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
    example: str = "lora r=8",
) -> Table:
    """Return a table whose rows are in groups.

    key: HTML id. caption: title of the table. groups: the title and the rows of each group; a group with an empty title
    has no row for its title. file: name of the CSV file, without the suffix. first: heading of the first column. by:
    heading of the column with the titles of the groups in the CSV file. example: an example of a text for the filter.
    """
    shown = [{"title": title, "rows": rows} for title, rows in groups]
    return {
        "id": key, "caption": caption, "file": file, "first": first, "by": by, "columns": columns, "groups": shown,
        "notes": list(notes), "remarks": [], "facets": {}, "stored": 0, "example": example, "short_flags": False,
    }  # fmt: skip


def condensed(made: Table, fixed: int | None = None) -> Table:
    """Return a table without the columns and rows in which nothing was measured. Remarks below it give the reasons.

    fixed: number of leading columns that describe a row and hold no measurement; if None, every row stays. A table
    without any number stays as it is.
    """
    rows = [row for part in made["groups"] for row in part["rows"]]
    kept = [i for i in range(len(made["columns"])) if any(row["fields"][i]["value"] is not None for row in rows)]
    if not kept or kept[-1] < (fixed or 0):
        return made
    empty = [i for i in range(len(made["columns"])) if i not in kept]
    why = group((_reasons(row["fields"][i] for row in rows), made["columns"][i]["label"]) for i in empty)
    remarks = [f"{', '.join(label.rsplit(', ', 1)[0] for label in same)}: {reason}." for reason, same in why.items()]

    def is_left_out(row: dict[str, Any]) -> bool:
        return fixed is not None and all(one["value"] is None for one in row["fields"][fixed:])

    left_out = list(filter(is_left_out, rows))
    if left_out:
        reasons = _reasons([row["fields"][-1] for row in left_out])
        remarks.append(f"Left out, as they have no numbers: {plural(len(left_out), 'row')} ({reasons}).")
    groups = [
        part
        | {"rows": [row | {"fields": [row["fields"][i] for i in kept]} for row in part["rows"] if not is_left_out(row)]}
        for part in made["groups"]
    ]
    return made | {
        "columns": [made["columns"][i] for i in kept], "groups": [part for part in groups if part["rows"]],
        "remarks": remarks, "stored": made["stored"] and len(rows) - len(left_out),
    }  # fmt: skip


def _reasons(fields: Iterable[Field]) -> str:
    """Return the first reasons for missing numbers, and how many others there are."""
    every = list(dict.fromkeys(f["why"] for f in fields if f["why"]))
    more = f"; and {plural(len(every) - _REASONS, 'other reason')}" if len(every) > _REASONS else ""
    return "; ".join(every[:_REASONS]) + more or "not measured"


def facets(rows: Iterable[Table]) -> dict[str, list[str]]:
    """Return the properties by which a reader can filter the rows: name -> values in natural order.

    A property with only one value is left out.
    """
    found = group(pair for row in rows for pair in row["facets"].items())
    values = {name: sorted({value for value in values if value}, key=_natural) for name, values in found.items()}
    return {name: values for name, values in values.items() if len(values) > 1}


def _facets(facts: RunFacts, cell: Cell) -> dict[str, str]:
    rank = str(cell.config.get("rank", ""))
    return {"method": cell.method, "rank": rank, "model": cell.model, "status": facts.status(cell)}


def _natural(text: str) -> tuple[float, str]:
    return (float(text) if text.isdecimal() else math.inf, text)


def stored(tables: Iterable[Table]) -> dict[str, Any]:
    """Return the rows of tables as data. When a reader opens a table, the page makes HTML rows from the data.

    - `rows`: list of (name, title, Record, link, facets), which several tables may share.
    - `tables`: HTML id of a table -> the title and the rows of each group. A row is (index in `rows`, anchor,
      fields...). Empty parts at the end of a field are left out.
    - `texts`: list of all strings. A field has indices into this list.
    """
    rows: dict[str, tuple[int, list[Any]]] = {}
    texts = {"": 0}
    found = {
        t["id"]: [[g["title"], [_packed(row, rows, texts) for row in g["rows"]]] for g in t["groups"]] for t in tables
    }
    return {"rows": [row for _, row in rows.values()], "texts": list(texts), "tables": found}


def _packed(row: Table, rows: dict[str, tuple[int, list[Any]]], texts: dict[str, int]) -> list[Any]:
    shared = [row["name"], row["title"], row["record"], row["href"], row["facets"]]
    number, known = rows.setdefault(row["href"], (len(rows), shared))
    known[-1] = known[-1] or row["facets"]
    return [number, row["anchor"], *(_packed_field(f, texts) for f in row["fields"])]


def _packed_field(f: Field, texts: dict[str, int]) -> list[Any]:
    parts = [f["value"], *(texts.setdefault(f[key], len(texts)) for key in ("text", "small", "why", "tone", "flag"))]
    if f["more"]:
        return [*parts, f["more"]]
    while parts[-1] == 0 and len(parts) > 2:
        parts.pop()
    return parts


def by_key(columns: Sequence[Column], fields: Sequence[Field]) -> dict[str, Field]:
    """Return key of a column -> field of a row in this column. Columns without a key are left out."""
    return {c["key"]: f for c, f in zip(columns, fields, strict=True) if c["key"]}


def measured(facts: RunFacts) -> list[tuple[Record, Measurements]]:
    """Return the Records with measurements, in the order of the suite's Cells."""
    return [(r, r.measurements) for r in facts.latest.values() if r.measurements]
