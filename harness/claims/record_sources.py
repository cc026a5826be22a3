"""Search for the Records (files with the results of runs) that decide a claim. Imports no torch.

The first run that has all Cells of a claim is used. Runs that the caller names come first, then the published runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from harness.analysis import contention, ranking
from harness.claims.measure import NotRunError
from harness.errors import did_you_mean
from harness.records import store
from harness.records.notes import concurrent_cells
from harness.records.record import Cell, Record, Status
from harness.resources import published_runs
from harness.suites import loader
from harness.suites.expand import Plan
from harness.suites.suite import Suite

_named: list[Path] = []
"""Run folders that are searched before the published ones."""


def look_in(runs: Iterable[Path]) -> None:
    """Make the functions of this module search these run folders before the published ones."""
    _named[:] = runs
    runs_of.cache_clear()


@cache
def runs_of(suite: str) -> tuple[store.Run, ...]:
    """Return the complete runs of a suite. suite: its name, or the path of its file.

    The runs given to `look_in` come first, and then the published runs. Within each of the two groups, newer runs come
    first.
    """
    folder = published_runs()
    published = sorted(path.parent for path in folder.glob("*/run.json")) if folder else []
    found: list[store.Run] = []
    name = _read(suite).name if suite.endswith(".yaml") else suite
    for folders in (_named, published):
        whole = [store.read_run(path) for path in folders if store.read_manifest(path).suite == name]
        whole = [run for run in whole if run.footer is not None and run.footer.how == "finished"]
        found += sorted(whole, key=lambda run: run.manifest.started, reverse=True)
    return tuple(found)


def records(suite: str, *entries: str) -> list[list[Record]]:
    """Return, for each entry id of a suite, the Records of its Cells, one per seed. All Records are from one run.

    Raises NotRunError if no complete run has these Cells, or if a Record is missing or has a status other than `ok`.
    Raises ValueError for an unknown entry.
    """
    wanted = [_cells(suite, entry) for entry in entries]
    cells = [cell_id for ids in wanted for cell_id in ids]
    found = next((run for run in runs_of(suite) if {one.cell_id for one in run.manifest.cells}.issuperset(cells)), None)
    if found is None:
        raise NotRunError(_missing(suite, entries))
    latest = found.latest()
    for entry, ids in zip(entries, wanted, strict=True):
        for cell_id in ids:
            if why := _unusable(latest.get(cell_id)):
                raise NotRunError(f"`{entry}` of {found.manifest.run} {why}")
    return [[latest[cell_id] for cell_id in ids] for ids in wanted]


def cell(suite: str, entry: str) -> Cell:
    """Return the Cell of a suite's entry, for the entry's first seed. Raises ValueError for an unknown entry."""
    first = _cells(suite, entry)[0]
    return next(one for one in _plan(suite).cells if one.cell_id == first)


def comparable(*sides: Sequence[Record]) -> None:
    """Raise ValueError unless all Records have the same model, task, dtype, test items and training budget."""
    first = sides[0][0].cell
    for record in (one for side in sides for one in side):
        if unequal := ranking.why_not_comparable(first, record.cell):
            raise ValueError(f"{first.label} and {record.cell.label} are not comparable: {unequal}")


def place(record: Record) -> str:
    """Return the machine that made a Record and the name of its run, as text."""
    machine = record.environment.machine
    gpu = machine.get("gpu0", "").split(",")
    name = gpu[1].strip() if record.device == "cuda" and len(gpu) > 1 else machine.get("cpu", "an unknown machine")
    return f"{name}, run {record.run}"


def shared(record: Record) -> str:
    """Return a warning if other work affected the times of a Record, otherwise an empty string."""
    why = "other Cells ran at the same time" if concurrent_cells(record) > 1 else contention.busy(record)
    hint = "run the suite again with --jobs 1 on an idle machine"
    return f"other work affected its times ({why}); {hint}" if why else ""


def entries(suite: str) -> list[str]:
    """Return the entry ids of a suite (name or file). Raises SuiteError for an invalid suite."""
    return [entry.id for entry in _read(suite).entries]


def unknown(suite: str, entry: str, there: Sequence[str]) -> str:
    """Return the error message for an unknown entry of a suite. there: the ids of the suite's entries."""
    return f"the suite {suite} has no entry `{entry}`; {did_you_mean(entry, sorted(there))}"


@cache
def _read(suite: str) -> Suite:
    return loader.load(suite)


def _plan(suite: str) -> Plan:
    return _read(suite).plan


def _cells(suite: str, entry: str) -> list[str]:
    plan = _plan(suite)
    tried = {cell_id for search in plan.tuning for cell_id in search.sweep}
    found = [cell_id for cell_id, name in plan.ids.items() if name == entry and cell_id not in tried]
    if not found:
        raise ValueError(unknown(suite, entry, entries(suite)))
    recipes = {cell.recipe_id: cell.label for cell in plan.cells if cell.cell_id in found}
    if len(recipes) > 1:
        labels = ", ".join(recipes.values())
        raise ValueError(f"the Cells of the entry `{entry}` of {suite} differ in more than their seed: {labels}")
    return found


def _missing(suite: str, entries: Sequence[str]) -> str:
    about = " ".join(_read(suite).about.split())
    which = f" of the current suite, with {', '.join(f'`{entry}`' for entry in entries)}" if runs_of(suite) else ""
    return (
        f"no complete run{which} is published or given by --run: `peft-harness run {suite}`, then "
        f"`peft-harness claims --run latest`. The suite: {about.partition('. ')[0].rstrip('.')}."
    )


def _unusable(record: Record | None) -> str:
    if record is None:
        return "has no readable, unmodified Record"
    if record.status is Status.OOM:
        where = place(record)
        return f"ran out of memory on {where}, so its peak is unknown; run it on a larger GPU"
    return "" if record.status is Status.OK else f"is {record.status.value}: {record.because}"
