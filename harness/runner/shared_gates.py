"""The parity gates that the Cells of a run have taken, and that later Cells may rest on.

No Cell waits for a gate: a Cell that starts before a gate with its key has ended takes its own. A resumed run takes its
gates anew, because the code of a plug-in may have changed in between.
"""

from __future__ import annotations

from harness.cell import gate_key
from harness.cell.job import Job, KnownGate
from harness.records.record import Outcome, Record


class SharedGates:
    """The gates of a run, by the part of the key that is known before a Cell's process starts.

    own: every Cell takes its own gate.
    """

    def __init__(self, *, own: bool = False) -> None:
        self._own = own
        self._gates: dict[str, KnownGate] = {}

    def add(self, key: str, record: Record) -> None:
        """Add the gate of a Record, if its attempt took one. key: from `gate_key.of_cell`.

        An attempt that ended before its gate did adds nothing. If Cells that ran at the same time took gates with one key, a
        failure is kept.
        """
        if not key or not record.gate or record.gate.record or self._own:
            return
        made, before = (
            KnownGate(key=record.gate.key, record=record.id, because=_why_failed(record)),
            self._gates.get(key),
        )
        if before is None or before.key != made.key or not before.because:
            self._gates[key] = made

    def known(self, job: Job) -> KnownGate | None:
        """Return the gate that a job may rest on. None if it must take its own."""
        return self._gates.get(gate_key.of_cell(job.cell, job.model, job.task, job.device))


def _why_failed(record: Record) -> str:
    """Return the reason why the gate of a Record failed. Empty if it passed, or if there was none."""
    results = record.checks[: record.gate.checks] if record.gate else []
    return record.because if any(result.outcome is Outcome.FAIL for result in results) else ""
