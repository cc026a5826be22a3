"""Which Records decide a claim: those of a run that is named, else of the newest published run of its suite. No torch."""

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
from harness.resources import checkout
from harness.suites import loader
from harness.suites.suite import Suite

_named: list[Path] = []


def look_in(runs: Iterable[Path]) -> None:
    """Let the Records of these run folders come before all published ones."""
    _named[:] = runs
    runs_of.cache_clear()


@cache
def runs_of(suite: str) -> tuple[store.Run, ...]:
    """Return the complete runs of a suite, by its name or its file: the named, then the published, newest first."""
    top = checkout()  # what is published stands in no wheel
    published = sorted(path.parent for path in (top / "results" / "published").glob("*/run.json")) if top else []
    found: list[store.Run] = []
    name = _read(suite).name if suite.endswith(".yaml") else suite
    for several in (_named, published):
        whole = [store.read_run(path) for path in several if store.read_manifest(path).suite == name]
        whole = [run for run in whole if run.footer is not None and run.footer.how == "finished"]
        found += sorted(whole, key=lambda run: run.manifest.started, reverse=True)
    return tuple(found)


def records(suite: str, *entries: str) -> list[list[Record]]:
    """Return for each entry of a suite, by its id there, the Records of its Cells, a seed each; all of one run.

    Raises NotRunError where no complete run has them all and `ok`, with the command that makes one; ValueError for an entry
    that the suite does not have.
    """
    wanted = [_cells(suite, entry) for entry in entries]
    cells = [cell_id for several in wanted for cell_id in several]
    found = next((run for run in runs_of(suite) if {one.cell_id for one in run.manifest.cells}.issuperset(cells)), None)
    if found is None:
        raise NotRunError(_missing(suite, entries))
    latest = found.latest()
    for entry, several in zip(entries, wanted, strict=True):
        for cell_id in several:
            if why := _unusable(latest.get(cell_id)):
                raise NotRunError(f"`{entry}` of {found.manifest.run} {why}")
    return [[latest[cell_id] for cell_id in several] for several in wanted]


def cell(suite: str, entry: str) -> Cell:
    """Return the Cell of an entry, of several seeds the first. Raises ValueError for one that the suite does not have."""
    first = _cells(suite, entry)[0]
    return next(one for one in _read(suite).plan.cells if one.cell_id == first)


def comparable(*sides: Sequence[Record]) -> None:
    """Raise ValueError unless all Records had the same model, texts and budget: no ratio or difference of unequal ones."""
    first = sides[0][0].cell
    for record in (one for side in sides for one in side):
        if unequal := ranking.why_not_comparable(first, record.cell):
            raise ValueError(f"{first.label} and {record.cell.label} are not comparable: {unequal}")


def place(record: Record) -> str:
    """Say where a Record was made."""
    machine = record.environment.machine
    gpu = machine.get("gpu0", "").split(",")
    name = gpu[1].strip() if record.device == "cuda" and len(gpu) > 1 else machine.get("cpu", "an unknown machine")
    return f"{name}, run {record.run}"


def shared(record: Record) -> str:
    """Say why a Record's times are not its Cell's own, as others had the machine too; empty where they are."""
    why = "other Cells ran at once" if concurrent_cells(record) > 1 else contention.busy(record)
    hint = "run the suite again with --jobs 1 on a machine that does nothing else"
    return f"its times are not its own ({why}); {hint}" if why else ""


def entries(suite: str) -> list[str]:
    """List the ids of the entries of a suite, by its name or the path of its file. Raises SuiteError for a wrong one."""
    return [entry.id for entry in _read(suite).entries]


def unknown(suite: str, entry: str, there: Sequence[str]) -> str:
    """Say that a suite has no such entry, and what it has."""
    return f"the suite {suite} has no entry `{entry}`; {did_you_mean(entry, sorted(there))}"


@cache
def _read(suite: str) -> Suite:
    return loader.load(suite)


def _cells(suite: str, entry: str) -> list[str]:
    plan = _read(suite).plan
    tried = {cell_id for search in plan.tuning for cell_id in search.sweep}
    found = [cell_id for cell_id, name in plan.ids.items() if name == entry and cell_id not in tried]
    if not found:
        raise ValueError(unknown(suite, entry, entries(suite)))
    recipes = {cell.recipe_id: cell.label for cell in plan.cells if cell.cell_id in found}
    if len(recipes) > 1:
        several = ", ".join(recipes.values())
        raise ValueError(f"the entry `{entry}` of {suite} is more than one Cell and its seeds: {several}")
    return found


def _missing(suite: str, entries: Sequence[str]) -> str:
    about = " ".join(_read(suite).about.split())
    told = f" of the suite as it is now, with {', '.join(f'`{entry}`' for entry in entries)}" if runs_of(suite) else ""
    return (
        f"no complete run{told} is published or named by --run: `peft-harness run {suite}`, then "
        f"`peft-harness claims --run latest`. The suite: {about.partition('. ')[0].rstrip('.')}."
    )


def _unusable(record: Record | None) -> str:
    if record is None:
        return "has no Record that can be read and is as the run left it"
    if record.status is Status.OOM:
        where = place(record)
        return (
            f"did not fit into the memory of {where}, which says nothing of what it takes; run it where there is more"
        )
    return "" if record.status is Status.OK else f"is {record.status.value}: {record.because}"
