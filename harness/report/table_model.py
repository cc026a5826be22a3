"""Tables of the report: columns, and rows in groups that sorting never mixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.analysis.run_facts import RunFacts
from harness.records.record import Cell, Measurements
from harness.report import links
from harness.report.formatting import Figure

Table = dict[str, Any]


def column(label: str, title: str = "", *, number: bool = True, key: str = "") -> dict[str, Any]:
    """Return a column's head. title: the tooltip; key: the name of the column for other renderers."""
    return {"label": label, "title": title, "number": number, "key": key}


def table(
    facts: RunFacts, key: str, caption: str, columns: list[dict[str, Any]], rows: list[Table], notes: Sequence[str] = ()
) -> Table:
    """Group rows by model and task, in the manifest's order: sorting never mixes groups."""
    groups: dict[tuple[str, str], list[Table]] = {}
    for row in rows:
        groups.setdefault((row["cell"].model, row["cell"].task), []).append(
            {**links.row(facts, row["cell"]), "figures": row["figures"], "anchor": row.get("anchor", "")}
        )
    return {
        "id": f"{facts.prefix}{key}",
        "caption": caption,
        "columns": columns,
        "notes": list(notes),
        "groups": [{"title": f"{model} · {task}", "rows": members} for (model, task), members in groups.items()],
    }


def by_key(columns: Sequence[dict[str, Any]], figures: Sequence[Figure]) -> dict[str, Figure]:
    """Map the keys of a row's columns to its figures."""
    return {c["key"]: f for c, f in zip(columns, figures, strict=True) if c["key"]}


def measurements(facts: RunFacts) -> Sequence[tuple[Cell, Measurements]]:
    """Return the Cells that were measured, in the order of their Records."""
    return [(r.cell, r.measurements) for r in facts.latest.values() if r.measurements]
