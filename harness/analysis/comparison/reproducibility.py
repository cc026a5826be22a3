"""Reproducibility: bitwise comparison of the losses of reruns, with the first differing step and the causes.

Losses may differ because of another machine, library, code version, number of threads, model or data set. A different
initial state or data order is not a cause, because both follow from the seed, which is part of the Cell. It only shows
where two runs diverged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from harness.errors import Exit
from harness.records import naming
from harness.records.record import Environment, Record, Status
from harness.records.store import Run

_GPU = "on a GPU some kernels sum in an order that varies from run to run"
_NOT_RECORDED = "not recorded"
CODE_VERSION, PROVIDER = "code version", "implementation from"
"""The two values of `Difference.what` for differences in code: the code of the harness, and the code of the library
that provides the implementation."""


class Difference(NamedTuple):
    """One difference between two Records: the name of the quantity, and its value in each Record."""

    what: str
    left: str
    right: str

    def __str__(self) -> str:
        return f"{self.what}: {self.left}, {self.right}"

    @property
    def recorded(self) -> bool:
        """True if both Records hold the value. Otherwise it is uncertain whether their values differ."""
        return _NOT_RECORDED not in (self.left, self.right)


@dataclass(frozen=True)
class Rerun:
    """Comparison of all ok Records of one Cell that was run several times."""

    cell_id: str
    """Id of the Cell."""
    label: str
    """Name of the Cell."""
    records: tuple[tuple[str, str], ...]
    """Pairs (name of the run, id of the Record)."""
    same_losses: bool | None
    """True if the losses of all Records are bitwise equal; None without training."""
    same_items: bool | None
    """True if all Records answered the same test items correctly; None if the Cell was not scored."""
    first_step: int | None
    """Number of the first step with different losses, counted from 0; None if all losses are equal."""
    causes: tuple[str, ...]
    """Differences between the Records, as texts, that may explain their different results."""
    seeded: tuple[str, ...]
    """Differences in the initial state or the order of the data, as texts. Equal seeds should make both equal."""
    unexplained: bool
    """True if two Records have different results without a known cause."""

    @property
    def equal(self) -> bool:
        """True if all Records have the same losses and the same answers."""
        return self.same_losses is not False and self.same_items is not False


def reruns(runs: Sequence[Run]) -> tuple[Rerun, ...]:
    """Compare the ok Records of each Cell that has several. Return one Rerun per Cell, in the order of the runs.

    Each Record is compared with the first earlier Record that was made in the same circumstances. If there is none, it
    is compared with the very first Record. Copies of a Record count once, e.g. if a run is named twice.
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
    """Return the comparisons of reruns in these runs, or None if the runs cannot contain a rerun.

    A single run with one attempt at each Cell contains no rerun.
    """
    repeated = len(runs) > 1 or any(len(run.records) > len(run.latest()) for run in runs)
    return reruns(runs) if repeated else None


def judge(found: Sequence[Rerun], *, strict: bool = False) -> Exit:
    """Return the exit code: FAIL for an unexplained difference, NOTHING_COMPARED without reruns, otherwise PASS.

    With `strict`, a difference with a known cause gives INCONCLUSIVE instead of PASS.
    """
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
        causes=tuple(dict.fromkeys(cause for found in causes for cause in found)),
        seeded=tuple(dict.fromkeys(str(d) for a, b in unequal for d in _seeded_differences(a, b))),
        unexplained=not all(causes),
    )


def _earlier(before: Sequence[Record], record: Record) -> Record:
    return next((r for r in before if not circumstances(r, record)), before[0])


def _losses(record: Record) -> list[float] | None:
    return record.training.losses if record.training else None


def _items(record: Record) -> list[tuple[str, int]] | None:
    return [(i.id, i.correct) for i in record.accuracy.items] if record.accuracy else None


def _first_difference(left: list[float], right: list[float]) -> int | None:
    return next((step for step, (a, b) in enumerate(zip_longest(left, right)) if a != b), None)


def _causes(left: Record, right: Record) -> list[str]:
    return [str(d) for d in circumstances(left, right)] or ([_GPU] if left.device not in ("", "cpu") else [])


def _seeded_differences(left: Record, right: Record) -> list[Difference]:
    a, b = left.training, right.training
    if a is None or b is None:
        return []
    hashes = {
        "initial state": (a.initial_state_sha256, b.initial_state_sha256),
        "order of the data": (a.data_order_sha256, b.data_order_sha256),
    }
    # An older Record has no hash; an unknown value is no difference.
    return [Difference(what, x[:12], y[:12]) for what, (x, y) in hashes.items() if x and y and x != y]


def circumstances(left: Record, right: Record) -> list[Difference]:
    """List the differences in environment, device, code and assets between two Records of one Cell.

    Each of them may explain different results.
    """
    return surroundings(left, right) + asset_differences(left, right)


def surroundings(left: Record, right: Record) -> list[Difference]:
    """List the differences between two Records in environment, environment variables, device and code."""
    changed = environment_differences(left.environment, right.environment)
    a, b = (r.environment.extra.get("variables") for r in (left, right))
    if isinstance(a, dict) and isinstance(b, dict):
        changed += _unequal(a, b, "not set", prefix="variable ")
    providers = [f"{p.distribution} {p.version}" if (p := r.provider) else _NOT_RECORDED for r in (left, right)]
    devices = [r.device or _NOT_RECORDED for r in (left, right)]
    return changed + [
        Difference(what, *values)
        for what, values in (("device", devices), (PROVIDER, providers))
        if values[0] != values[1]
    ]


def asset_differences(left: Record, right: Record) -> list[Difference]:
    """List the differences between the models, data and tasks of two Records."""
    if not left.assets or not right.assets:  # an older Record names no assets
        return []
    a, b = ({use.name: use for use in r.assets} for r in (left, right))
    found = []
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name), b.get(name)
        if x is None or y is None:
            found.append(Difference(name, "used" if x else "not used", "used" if y else "not used"))
        elif x.sha256 != y.sha256:
            found.append(Difference(name, f"sha256 {x.sha256[:12] or 'unknown'}", y.sha256[:12] or "unknown"))
        elif x.revision != y.revision:
            found.append(Difference(name, f"revision {x.revision or 'unknown'}", y.revision or "unknown"))
    return found


def environment_differences(left: Environment, right: Environment) -> list[Difference]:
    """List the differences in software, machine, number of threads and code version."""
    return _unequal(_flat(left), _flat(right))


def _unequal(
    left: Mapping[str, Any], right: Mapping[str, Any], missing: str = "none", prefix: str = ""
) -> list[Difference]:
    """List the differences between two mappings, one for each key whose values differ.

    missing: text to show for a key that one mapping lacks.
    """
    changed = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
    return [Difference(f"{prefix}{key}", str(left.get(key, missing)), str(right.get(key, missing))) for key in changed]


def usual_environment(run: Run) -> Environment:
    """Return the most frequent environment of a run's ok Records. On a tie, prefer the environment of the runner.

    The runner is the process that starts the Cells. Cells may have another environment than the runner: on a cluster,
    they may run on other machines, and Cells that run at the same time share the threads of a machine.
    """
    ok = [record.environment for record in run.latest().values() if record.status is Status.OK]
    found = Counter(_key(e) for e in ok)
    most = max(found.values(), default=0)
    return next(e for e in (run.manifest.environment, *ok) if found[_key(e)] == most)


def records_from_other_environments(run: Run) -> dict[str, list[Record]]:
    """Return the newest Record of each Cell that was made in an unusual environment, grouped by environment.

    Each key is a text that lists the differences from the usual environment.
    """
    usual = usual_environment(run)
    found: dict[str, list[Record]] = {}
    for record in run.latest().values():
        here = _key(record.environment)
        # If a worker left no Record, the runner wrote one with its own environment, since it knows no other.
        if here != _key(usual) and (record.status is Status.OK or here != _key(run.manifest.environment)):
            differences = environment_differences(usual, record.environment)
            found.setdefault("; ".join(map(str, differences)), []).append(record)
    return found


def _key(e: Environment) -> tuple[str, ...]:
    return e.id, *(f"{key}: {value}" for key, value in sorted(_flat(e).items()))


def _flat(e: Environment) -> dict[str, str]:
    flat = {f"software {k}": v for k, v in e.software.items()} | {f"machine {k}": v for k, v in e.machine.items()}
    return flat | {"threads": str(e.threads), CODE_VERSION: e.code_version[:12]}
