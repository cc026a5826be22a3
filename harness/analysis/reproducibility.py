"""Did a rerun give the same losses, to the last bit? If not: from which step on, and what differed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.records import Environment, Record, Status
from harness.store import Run


@dataclass(frozen=True)
class Rerun:
    """One Cell with several ok Records.

    same_losses: None if the Cell does not train. first_step: the first differing step, counting from 0. why: what the
    environments differ in, or that they do not; empty when all is equal. records: (run, Record id).
    """

    cell_id: str
    label: str
    records: tuple[tuple[str, str], ...]
    same_losses: bool | None
    same_items: bool | None
    first_step: int | None
    why: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Say whether nothing that was compared differs."""
        return self.same_losses is not False and self.same_items is not False


def reruns(runs: Sequence[Run]) -> tuple[Rerun, ...]:
    """Compare, for every Cell with two or more ok Records in `runs`, each of them with the first.

    In the order of the manifests.
    """
    by_cell: dict[str, list[Record]] = {cell.cell_id: [] for run in runs for cell in run.manifest.cells}
    for run in runs:
        for record in sorted(run.records, key=lambda r: r.attempt):
            if record.status is Status.OK:
                by_cell.setdefault(record.cell_id, []).append(record)
    return tuple(_rerun(records) for records in by_cell.values() if len(records) > 1)


def _rerun(records: list[Record]) -> Rerun:
    first, *others = records
    losses = [_losses(r) for r in records]
    items = [_items(r) for r in records]
    same_losses = None if losses[0] is None else all(x == losses[0] for x in losses)
    same_items = None if items[0] is None else all(x == items[0] for x in items)
    steps = [_first_difference(losses[0] or [], x or []) for x in losses[1:]]
    why: tuple[str, ...] = ()
    if same_losses is False or same_items is False:
        unequal = [
            r
            for r, loss, item in zip(others, losses[1:], items[1:], strict=True)
            if loss != losses[0] or item != items[0]
        ]
        changed = [change for r in unequal for change in environment_differences(first.environment, r.environment)]
        notes = [note for r in records for note in r.notes]
        why = tuple(dict.fromkeys([*(changed or ["same environment, yet not equal"]), *notes]))
    return Rerun(
        cell_id=first.cell_id,
        label=first.cell.label,
        records=tuple((r.run, r.id) for r in records),
        same_losses=same_losses,
        same_items=same_items,
        first_step=min((s for s in steps if s is not None), default=None),
        why=why,
    )


def _losses(record: Record) -> list[float] | None:
    training = record.measurements.training if record.measurements else None
    return training.losses if training else None


def _items(record: Record) -> list[tuple[str, int]] | None:
    accuracy = record.measurements.accuracy if record.measurements else None
    return [(i.id, i.correct) for i in accuracy.items] if accuracy else None


def _first_difference(left: list[float], right: list[float]) -> int | None:
    for step, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return step
    return None if len(left) == len(right) else min(len(left), len(right))


def environment_differences(left: Environment, right: Environment) -> list[str]:
    """List what two environments differ in, as `key: this, that`."""
    a, b = _flat(left), _flat(right)
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key, 'none')}, {b.get(key, 'none')}" for key in changed]


def _flat(e: Environment) -> dict[str, str]:
    flat = {f"software {k}": v for k, v in e.software.items()} | {f"machine {k}": v for k, v in e.machine.items()}
    return flat | {"threads": str(e.threads), "code version": e.code_version[:12]}
