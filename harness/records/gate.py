"""The parity gate of a Record: the checks of the Cell's own layers before it is measured. Imports no torch.

A Cell runs the gate itself, or reuses the gate of an earlier Cell of the run.
"""

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
    """Record of the same run whose gate this attempt reuses, as `cell_id.attempt`. Empty if the attempt ran the gate
    itself."""
    checks: Count = 0
    """Number of results that come first in `Record.checks`: those of the gate, and then a reused check of merged weights.
    In a Record's file, this number is 0 if another Record ran the gate; reading a run counts the reused results."""
    merging: bool = False
    """True if the attempt also reuses the check of merged weights that `record` made after its training."""


def shared(records: Iterable[Record]) -> tuple[list[Record], dict[str, str]]:
    """Copy the reused results of parity gates, and of merged weights, into the Records that reuse them, as first checks.

    Return the usable Records, and the reasons why others are not usable, by Record id. A Record is not usable if the
    Record with the reused results is missing or was changed.
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
        merged = [check for check in other.checks[taken.checks :] if check.of_merging] if other and taken else []
        lacking = record.gate.merging and not merged
        if other is None or taken is None or taken.record or taken.key != record.gate.key or lacking:
            ungated[record.id] = (
                f"rests on the parity gate of Record {record.gate.record}, which is missing or was changed"
            )
            continue
        reused = other.checks[: taken.checks] + (merged if record.gate.merging else [])
        gate = record.gate.model_copy(update={"checks": len(reused)})
        found.append(record.model_copy(update={"gate": gate, "checks": reused + record.checks}))
    return found, ungated
