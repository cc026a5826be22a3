"""Links and names within a page: anchors of Cells, fields that identify the row of a Cell, short names of recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.analysis.ranking import RankingEntry
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


def short_names(cells: Sequence[Cell], names: Sequence[str]) -> list[str]:
    """Return the names of Cells without the implementation, for methods that have only one implementation.

    If two of these short names are equal, return the full names of all Cells. names: the full names.
    """
    implementations = Counter(method for method, _ in {(cell.method, cell.implementation) for cell in cells})
    found = [
        name.replace(f" [{cell.implementation}]", "", 1) if implementations[cell.method] == 1 else name
        for cell, name in zip(cells, names, strict=True)
    ]
    return found if len(set(found)) == len(set(names)) else list(names)


def entry_names(facts: RunFacts, entries: Sequence[RankingEntry]) -> dict[int, str]:
    """Return id() of an entry -> its short name, for the entries of a ranking group."""
    names = short_names([e.record.cell for e in entries], [facts.entry_name(e) for e in entries])
    return dict(zip(map(id, entries), names, strict=True))
