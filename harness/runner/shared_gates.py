"""Results of the parity gates of a run, which later Cells with the same gate key reuse.

A parity gate checks a Cell's own layers against the reference before the Cell is measured. A Cell without latencies
also reuses the check of merged weights, which follows the training, from a Cell of its recipe. No Cell waits for the
gate of another Cell: until the first Cell with a key has ended, Cells with other keys go first. If there are none, the
next Cell runs its own gate. A resumed run does not reuse earlier results, because the code of a plug-in may have
changed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from harness.cell import gate_key
from harness.cell.job import Job, KnownGate
from harness.records.record import Cell, Outcome, Record


class SharedGates:
    """The results of the parity gates of a run, by the key that `gate_key.of_cell` returns.

    own: if true, nothing is stored, so every Cell runs its own gate.
    """

    def __init__(self, *, own: bool = False) -> None:
        self._own = own
        self._gates: dict[str, KnownGate] = {}
        self._running: dict[str, str] = {}  # id of a Cell that runs its own gate -> key

    def in_order(self, cells: Sequence[Cell], key_of: Callable[[Cell], str]) -> Iterator[Cell]:
        """Yield the Cells in their order, except that a Cell lets later ones go first while another Cell runs the gate
        that it could reuse.

        key_of: returns the key of a Cell's gate, from `gate_key.of_cell`.
        """
        left = [(cell, key_of(cell)) for cell in cells]
        while left:
            running = set(self._running.values())
            index = next((i for i, (_, key) in enumerate(left) if key not in running), 0)
            yield left.pop(index)[0]

    def add(self, key: str, record: Record) -> None:
        """Store the result of the parity gate in a Record. key: from `gate_key.of_cell`.

        No gate is stored if the attempt ended before its gate, or reused the gate of another Cell. Concurrent Cells may
        run gates with the same key. Then a failure replaces a pass, and a pass never replaces a failure. This holds for
        the check of merged weights, too, also if it failed in a Cell that reused the gate.
        """
        self._running.pop(record.cell_id, None)
        if not key or not record.gate or self._own:
            return
        merged, known = _merged(record), self._gates.get(key)
        before = known if known is not None and known.key == record.gate.key else None
        if not record.gate.record and (before is None or not before.because):
            recipe = record.cell.recipe_id if merged and (before is None or before.merged_recipe) else ""
            self._gates[key] = KnownGate(
                key=record.gate.key, record=record.id, because=_why_failed(record), merged_recipe=recipe
            )
        elif before is not None and merged is False:
            self._gates[key] = before.model_copy(update={"merged_recipe": ""})

    def known(self, job: Job) -> KnownGate | None:
        """Return the gate that the Cell of a job may reuse. None if the Cell must run its own."""
        key = gate_key.of_cell(job.cell, job.model, job.task, job.device)
        found = self._gates.get(key)
        if key and found is None and not self._own:
            self._running[job.cell.cell_id] = key
        return found


def _why_failed(record: Record) -> str:
    """Return the reason why the gate of a Record failed. Empty if it passed, or if the Record has no gate."""
    results = record.checks[: record.gate.checks] if record.gate else []
    return record.because if any(result.outcome is Outcome.FAIL for result in results) else ""


def _merged(record: Record) -> bool | None:
    """Return whether the merged weights passed their check after training. None if there was no such check."""
    own = record.checks[record.gate.checks if record.gate else 0 :]
    outcomes = {check.outcome for check in own if check.of_merging}
    return outcomes == {Outcome.PASS} if outcomes else None
