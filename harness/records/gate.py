"""The parity gate of a Record: taken by the Cell itself, or by an earlier Cell of the run. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from harness.records.base_model import Count, FrozenModel

if TYPE_CHECKING:
    from harness.records.record import Record


class Gate(FrozenModel):
    """The parity gate of an attempt."""

    key: str
    """Hash of everything that the result of the gate depends on. Cells with equal keys may share a gate."""
    record: str = ""
    """Record of the same run whose gate this attempt rests on, as `cell_id.attempt`. Empty if the attempt took the gate
    itself."""
    checks: Count = 0
    """Number of the gate's results. They are the first entries of the Record's `checks`. In the file of a Record that
    rests on another one, the number is 0."""


def shared(records: Iterable[Record]) -> tuple[list[Record], dict[str, str]]:
    """Add the results of shared gates to the Records that rest on them.

    Return the Records, and the reason why a Record does not count, by its id: the Record that it rests on is missing.
    The other Record stays as it is, and both have the gate's results as their first checks.
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
