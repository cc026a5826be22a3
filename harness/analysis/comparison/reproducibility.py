"""Reproducibility: compare the losses of reruns bitwise, and find the first differing step and the causes.

A different machine, library, code, thread count, model or data explains a difference. The order of the data and the initial
state follow from the seed, which is part of the Cell. A difference in them shows where two runs diverged, and explains
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import Exit
from harness.records import naming
from harness.records.record import Environment, Record, Status, TrainingMeasured
from harness.records.store import Run

_GPU = "on a GPU some kernels sum in an order that varies from run to run"


@dataclass(frozen=True)
class Rerun:
    """One Cell with several ok Records."""

    cell_id: str
    """Id of the Cell."""
    label: str
    """Name of the Cell."""
    records: tuple[tuple[str, str], ...]
    """Pairs (run, Record id)."""
    same_losses: bool | None
    """True if the losses are bitwise equal; None without training."""
    same_items: bool | None
    """True if the answers are equal; None without scoring."""
    first_step: int | None
    """First differing step, from 0."""
    causes: tuple[str, ...]
    """Differences in the circumstances of unequal Records."""
    parted: tuple[str, ...]
    """Other differences of unequal Records that the seed should have prevented."""
    unexplained: bool
    """True if some unequal Records have no cause."""

    @property
    def equal(self) -> bool:
        """True if no comparison found a difference."""
        return self.same_losses is not False and self.same_items is not False


def reruns(runs: Sequence[Run]) -> tuple[Rerun, ...]:
    """Compare the ok Records of every Cell that has two or more in `runs`, in the order of the manifests.

    Each Record is compared with the first one from the same circumstances, or else with the first of all. A copy of a
    Record (a run named twice, a copied folder) is no rerun.
    """
    cells = {cell.cell_id: cell for run in runs for cell in run.manifest.cells}
    by_cell: dict[str, list[Record]] = {cell_id: [] for cell_id in cells}
    for run in runs:
        for record in sorted(run.records, key=lambda r: r.attempt):
            found = by_cell.setdefault(record.cell_id, [])
            if record.status is Status.OK and record not in found:
                found.append(record)
    repeated = {i: records for i, records in by_cell.items() if len(records) > 1}
    names = naming.full([*cells.values(), *(records[0].cell for records in repeated.values())])
    return tuple(_rerun(names[i], records) for i, records in repeated.items())


def possible_reruns(runs: Sequence[Run]) -> tuple[Rerun, ...] | None:
    """Return `reruns`; None for a single run with one attempt at each Cell, which cannot have any."""
    repeated = len(runs) > 1 or any(len(run.records) > len(run.latest()) for run in runs)
    return reruns(runs) if repeated else None


def judge(found: Sequence[Rerun], *, strict: bool = False) -> Exit:
    """Return the exit code of a comparison: an unexplained difference is a failure, an explained one is none."""
    if any(r.unexplained for r in found):
        return Exit.FAIL
    if not found:
        return Exit.NOTHING_COMPARED
    return Exit.INCONCLUSIVE if strict and not all(r.equal for r in found) else Exit.PASS


def _rerun(label: str, records: Sequence[Record]) -> Rerun:
    pairs = [(_earlier(records[:i], record), record) for i, record in enumerate(records) if i]
    unequal = [(a, b) for a, b in pairs if _losses(a) != _losses(b) or _items(a) != _items(b)]
    causes = [_causes(a, b) for a, b in unequal]
    steps = [_first_difference(_losses(a) or [], _losses(b) or []) for a, b in unequal]
    return Rerun(
        cell_id=records[0].cell_id,
        label=label,
        records=tuple((r.run, r.id) for r in records),
        same_losses=None if _losses(records[0]) is None else all(_losses(a) == _losses(b) for a, b in pairs),
        same_items=None if _items(records[0]) is None else all(_items(a) == _items(b) for a, b in pairs),
        first_step=min((s for s in steps if s is not None), default=None),
        causes=tuple(dict.fromkeys(cause for named in causes for cause in named)),
        parted=tuple(dict.fromkeys(p for a, b in unequal for p in _parted(a, b))),
        unexplained=not all(causes),
    )


def _earlier(before: Sequence[Record], record: Record) -> Record:
    return next((r for r in before if not circumstances(r, record)), before[0])


def _training(record: Record) -> TrainingMeasured | None:
    return record.measurements.training if record.measurements else None


def _losses(record: Record) -> list[float] | None:
    training = _training(record)
    return training.losses if training else None


def _items(record: Record) -> list[tuple[str, int]] | None:
    accuracy = record.measurements.accuracy if record.measurements else None
    return [(i.id, i.correct) for i in accuracy.items] if accuracy else None


def _first_difference(left: list[float], right: list[float]) -> int | None:
    for step, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return step
    return None if len(left) == len(right) else min(len(left), len(right))


def _causes(left: Record, right: Record) -> list[str]:
    named = circumstances(left, right)
    return named or ([_GPU] if left.device not in ("", "cpu") else [])


def _parted(left: Record, right: Record) -> list[str]:
    a, b = _training(left), _training(right)
    if a is None or b is None:
        return []
    hashes = {
        "initial state": (a.initial_state_sha256, b.initial_state_sha256),
        "order of the data": (a.data_order_sha256, b.data_order_sha256),
    }
    # An older Record has no hash; an unknown value is no difference.
    return [f"{what}: {x[:12]}, {y[:12]}" for what, (x, y) in hashes.items() if x and y and x != y]


def circumstances(left: Record, right: Record) -> list[str]:
    """List the differences in the inputs and surroundings of two Records of one Cell, as `what: this, that`."""
    return surroundings(left, right) + asset_differences(left, right)


def surroundings(left: Record, right: Record) -> list[str]:
    """List the differences in the surroundings of two Records: all of `circumstances` except model and data."""
    changed = environment_differences(left.environment, right.environment)
    a, b = (r.environment.extra.get("variables") for r in (left, right))
    if isinstance(a, dict) and isinstance(b, dict):
        unequal = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        changed += [f"variable {k}: {a.get(k, 'not set')}, {b.get(k, 'not set')}" for k in unequal]
    if left.device != right.device:
        changed.append(f"device: {left.device or 'not recorded'}, {right.device or 'not recorded'}")
    makers = [
        f"{r.provider.distribution} {r.provider.version}" if r.provider else "not recorded" for r in (left, right)
    ]
    if makers[0] != makers[1]:
        changed.append(f"implementation from: {', '.join(makers)}")
    return changed


def asset_differences(left: Record, right: Record) -> list[str]:
    """List the differences of two Records in models, data and tasks, as `what: this, that`."""
    if not left.assets or not right.assets:  # an older Record names none
        return []
    a, b = ({use.name: use for use in r.assets} for r in (left, right))
    found = []
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name), b.get(name)
        if x is None or y is None:
            found.append(f"{name}: {'used' if x else 'not used'}, {'used' if y else 'not used'}")
        elif x.sha256 != y.sha256:
            found.append(f"{name}: sha256 {x.sha256[:12] or 'unknown'}, {y.sha256[:12] or 'unknown'}")
        elif x.revision != y.revision:
            found.append(f"{name}: revision {x.revision or 'unknown'}, {y.revision or 'unknown'}")
    return found


def environment_differences(left: Environment, right: Environment) -> list[str]:
    """List the differences of two environments, as `key: this, that`."""
    a, b = _flat(left), _flat(right)
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key, 'none')}, {b.get(key, 'none')}" for key in changed]


def usual_environment(run: Run) -> Environment:
    """Return the most frequent environment of a run's ok Records; on a tie with the runner's environment, that one.

    On a cluster, Cells may run on other machines than the runner's; several jobs share its threads.
    """
    ok = [record.environment for record in run.latest().values() if record.status is Status.OK]
    found = Counter(_key(e) for e in ok)
    most = max(found.values(), default=0)
    return next(e for e in (run.manifest.environment, *ok) if found[_key(e)] == most)


def strangers(run: Run) -> dict[tuple[str, ...], list[Record]]:
    """Return the newest Records from other environments than the usual one, by the differences."""
    usual = usual_environment(run)
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in run.latest().values():
        here = _key(record.environment)
        # For a worker that left no Record the runner writes one, with its own environment: it knows no other.
        if here != _key(usual) and (record.status is Status.OK or here != _key(run.manifest.environment)):
            found.setdefault(tuple(environment_differences(usual, record.environment)), []).append(record)
    return found


def _key(e: Environment) -> tuple[str, ...]:
    return e.id, *(f"{key}: {value}" for key, value in sorted(_flat(e).items()))


def _flat(e: Environment) -> dict[str, str]:
    flat = {f"software {k}": v for k, v in e.software.items()} | {f"machine {k}": v for k, v in e.machine.items()}
    return flat | {"threads": str(e.threads), "code version": e.code_version[:12]}
