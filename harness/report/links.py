"""Links within a page: anchors of Cells, and the fields that identify the row of a Cell."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.run_facts import RunFacts
from harness.records.record import Cell


def anchor(facts: RunFacts, cell_id: str) -> str:
    """Return the HTML id of a Cell's row in the comparison table."""
    return f"{facts.prefix}cell-{cell_id}"


def row(facts: RunFacts, cell: Cell) -> dict[str, str]:
    """Return the fields that identify the row of a Cell in any table."""
    record = facts.latest.get(cell.cell_id)
    return {
        "name": facts.names[cell.cell_id],
        "record": record.id if record else cell.cell_id,
        "href": f"#{anchor(facts, cell.cell_id)}",
        "title": facts.titles[cell.cell_id],
    }


def sources(facts: RunFacts, record_ids: Sequence[str]) -> list[dict[str, str]]:
    """Return links to the rows of these Records in the comparison table."""
    return [{"id": i, "href": f"#{anchor(facts, i.split('.')[0])}"} for i in record_ids]
