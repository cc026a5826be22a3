"""The parity gate of a Record: taken by the Cell itself, or by an earlier Cell of the run. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from harness.records.base_model import Count, FrozenModel

if TYPE_CHECKING:
    from harness.records.record import Record


class Gate(FrozenModel):
    """The parity gate that an attempt at a Cell uses: its own, or that of another Record of the run."""

    key: str
    """Hash of everything that the result of the gate depends on. Cells with equal keys may share a gate."""
    record: str = ""
    """Record of the same run whose gate this attempt uses, as `cell_id.attempt`. Empty if the attempt took
    the gate itself."""
    checks: Count = 0
    """Number of entries at the start of `Record.checks` that are results of the gate. It is 0 in the file of a Record
    if another Record took the gate."""


def shared(records: Iterable[Record]) -> tuple[list[Record], dict[str, str]]:
    """Copy the results of each shared parity gate into the Records that use it, as their first checks.

    Return the usable Records, and a dict that maps the id of each other Record to the reason why it is not
    usable. A Record is not usable if the Record that took its gate is missing or was changed.
    """
    records = list(records)
    by_id = {record.id: record for record in records}
    found, ungated = [], {}
    for record in records:
        if record.gate is None or not record.gate.record:
            found.append(record)
            continue
        other = by_id.get(record.gate.record)
        taken = other.gate if other else None
        if other is None or taken is None or taken.record or taken.key != record.gate.key:
            ungated[record.id] = (
                f"rests on the parity gate of Record {record.gate.record}, which is missing or was changed"
            )
            continue
        gate = record.gate.model_copy(update={"checks": taken.checks})
        checks = [*other.checks[: taken.checks], *record.checks]
        found.append(record.model_copy(update={"gate": gate, "checks": checks}))
    return found, ungated
