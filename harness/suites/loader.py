"""Load suites without torch.

A suite is validated in two stages. The first checks keys and types of the YAML (`schema`). The second checks what they
mean: names, combinations and duplicates. Each stage reports all its mistakes at once, with file, line and hint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness import yaml_validation
from harness.assets.table import Source, load_table, with_absolute_path
from harness.errors import Problem, SuiteError, UsageError, did_you_mean, sort_problems
from harness.methods.peft_config import UNREFERENCED
from harness.methods.registry import Registry, discover
from harness.methods.spec import methods
from harness.records.record import Cell
from harness.resources import data_folder
from harness.suites import expand
from harness.suites.entry import MAX_CELLS, SuiteContext, SuiteEntry, check_entry
from harness.suites.schema import SYNTHETIC, CellKeys, ComparisonKeys, SuiteKeys
from harness.suites.suite import Suite
from harness.yaml_validation import KeyPath


def names() -> list[str]:
    """List the suites that come with the harness: the names of the files in `suites/` that have the key `matrix`."""
    files = sorted(data_folder("suites").glob("*.yaml"))
    return [path.stem for path in files if "\nmatrix:" in path.read_text(encoding="utf-8")]


def find(name_or_path: str | Path) -> Path:
    """Return the file of a suite, given its name or path. Raises UsageError for an unknown name or a missing file."""
    path = Path(name_or_path)
    is_file = path.suffix in (".yaml", ".yml")
    if is_file and path.exists():
        return path
    if is_file or str(name_or_path) not in names():
        what = "no file" if is_file else "no suite"
        hint = did_you_mean(path.stem if is_file else str(name_or_path), names(), "name a .yaml file, or one of")
        raise UsageError(f"{what} `{name_or_path}`", where="SUITE", hint=hint)
    return data_folder("suites") / f"{name_or_path}.yaml"


def load(name_or_path: str | Path, *, registry: Registry | None = None) -> Suite:
    """Load a suite, given its name or path. registry: by default, the installed implementations.

    Raises SuiteError with all mistakes of the first stage or, if there are none, with all mistakes of the second stage.
    """
    document, keys = yaml_validation.load_model(find(name_or_path), SuiteKeys)
    context = SuiteContext(document, registry or discover(), methods() | UNREFERENCED)
    context.sources = _sources(context, keys)
    entries = [entry for paths in _entry_paths(keys) if (entry := check_entry(context, *paths)) is not None]
    expanded = _expand(context, entries)
    for index, comparison in enumerate(keys.comparisons):
        _check_comparison(context, ("comparisons", index), comparison)
    if context.problems:
        raise SuiteError(sort_problems(context.problems))
    return Suite(
        name=keys.suite,
        title=keys.title,
        about=keys.about,
        path=document.path,
        sha256=hashlib.sha256(document.raw).hexdigest(),
        text=document.raw.decode(),
        entries=tuple(entries),
        plan=expand.expand(expanded, keys.comparisons),
        sources=context.sources,
        tasks=context.tasks,
    )


def _sources(context: SuiteContext, keys: SuiteKeys) -> dict[str, Source]:
    sources = load_table(data_folder("suites") / "sources.yaml")
    for index, source in enumerate(keys.sources):
        # A cell_id depends only on the name of a source, so a name must always mean the same source.
        if source.name in sources:
            context.problem(("sources", index), f"duplicate source `{source.name}`", "rename it")
        sources[source.name] = with_absolute_path(source, context.folder)
    return sources


def _entry_paths(keys: SuiteKeys) -> Iterator[tuple[KeyPath, KeyPath]]:
    """Yield a pair (path of the block, path of the entry) for each entry.

    A block without `cells` is itself an entry. Then both paths are equal.
    """
    for i, block in enumerate(keys.matrix):
        if block.cells is None:
            yield ("matrix", i), ("matrix", i)
        for j in range(len(block.cells or ())):
            yield ("matrix", i), ("matrix", i, "cells", j)


def _expand(context: SuiteContext, entries: list[SuiteEntry]) -> list[tuple[SuiteEntry, list[Cell]]]:
    """Return each entry with its Cells. Report entries that share a Cell, and too many Cells."""
    if (total := sum(map(expand.count, entries))) > MAX_CELLS:
        what = f"{total} Cells exceed the limit of {MAX_CELLS}"
        context.problem(("matrix",), what, "shorten a list, or split the suite")
        return []
    expanded = [(entry, list(expand.cells(entry))) for entry in entries]
    first: dict[str, SuiteEntry] = {}
    for entry, cells in expanded:
        if equal := next((cell for cell in cells if cell.cell_id in first), None):
            other = first[equal.cell_id]
            what = f"`{entry.id}` and `{other.id}` have the same Cell, {equal.label}"
            context.problems.append(Problem(entry.where, what, f"the other is at {other.where}"))
        first |= {cell.cell_id: entry for cell in cells if cell.cell_id not in first}
    return expanded


def _check_comparison(context: SuiteContext, path: KeyPath, keys: ComparisonKeys) -> None:
    sides = {"better": keys.better, "than": keys.than, "same-losses": keys.same_losses, "as": keys.as_}
    for key, ids in sides.items():
        for i, name in enumerate(ids):
            if name not in context.ids:
                context.problem(
                    (*path, key, i), f"unknown id `{name}` in `{key}`", did_you_mean(name, context.ids, "ids")
                )
    if set(keys.left) & set(keys.right):
        context.problem(path, "compares an entry with itself", "name different ids")
    entries = {name: context.entries[name] for name in (*keys.left, *keys.right) if name in context.entries}
    if keys.kind == "better":
        _check_scores(context, path, entries)
    else:
        _check_losses(context, path, entries, keys.right)


def _check_scores(context: SuiteContext, path: KeyPath, entries: Mapping[str, CellKeys]) -> None:
    scored = {(*entry.task, entry.evaluation.items) for entry in entries.values()}
    if len(scored) > 1:
        context.problem(path, "the two sides are not scored on the same items", "give them one task and one `items`")
    for name, entry in entries.items():
        if entry.is_synthetic:
            what = f"`better` compares accuracies, but `{name}` has none: its task is {SYNTHETIC}"
            context.problem(path, what, "compare Cells with an accuracy, or use `same-losses`")


def _check_losses(context: SuiteContext, path: KeyPath, entries: Mapping[str, CellKeys], right: list[str]) -> None:
    for name, entry in entries.items():
        if name in right and set(entry.dtype) != {"float64"}:
            context.problem(path, f"`as` names `{name}`, which is not float64", "compare with a float64 Cell")
        if entry.training.steps == 0:
            context.problem(path, f"`{name}` does not train, so it has no losses", "compare Cells that train")
