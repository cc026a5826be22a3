"""Suites: read, checked as a whole, resolved. Every mistake comes back at once, with file, line and mend. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import ValidationError

from harness import yaml_lines
from harness.assets.table import Source, load_table, parse_source
from harness.errors import Problem, SuiteError, UsageError, in_order, near
from harness.methods.peft_config import UNREFERENCED
from harness.methods.registry import Registry, discover
from harness.methods.spec import methods
from harness.resources import folder
from harness.suites import expand, schema, tasks
from harness.suites.entry import MOST_CELLS, Reading, SuiteEntry, read_entry
from harness.suites.schema import ComparisonKeys, SuiteKeys, is_entry
from harness.suites.suite import Compared, Suite
from harness.yaml_lines import KeyPath


def names() -> list[str]:
    """List the suites that come with the harness: the files in `suites/` that have a matrix."""
    files = sorted(folder("suites").glob("*.yaml"))
    return [path.stem for path in files if "\nmatrix:" in path.read_text(encoding="utf-8")]


def find(name_or_path: str | Path) -> Path:
    """Return a suite's file, from its name or its path."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    if str(name_or_path) not in names():
        hint = near(str(name_or_path), names(), "name a .yaml file, or one of")
        raise UsageError(f"no suite `{name_or_path}`", where="SUITE", hint=hint)
    return folder("suites") / f"{name_or_path}.yaml"


def load(name_or_path: str | Path, *, registry: Registry | None = None) -> Suite:
    """Read and check a suite; raises SuiteError with all its mistakes. `registry` defaults to what is installed."""
    document = yaml_lines.read(find(name_or_path))
    keys, problems = schema.read(document, SuiteKeys)
    reading = Reading(document, problems, registry or discover(), methods() | UNREFERENCED)
    suite = _suite(reading, keys)
    if problems:
        raise SuiteError(in_order(problems))
    return suite


def _suite(reading: Reading, keys: SuiteKeys) -> Suite:
    for name in ("suite", "matrix"):
        if getattr(keys, name) is None and not reading.document.is_cut((name,)):
            reading.problem((), f"`{name}` is missing", f"add `{name}:`")
    _sources(reading, keys)
    entries = [entry for ways in _ways(reading, keys) if (entry := read_entry(reading, *ways)) is not None]
    _no_equal_cells(reading, entries)
    comparisons = [_comparison(reading, index, c) for index, c in enumerate(keys.comparisons)]
    return Suite(
        name=keys.suite or "",
        title=keys.title,
        about=keys.about,
        path=reading.document.path,
        sha256=hashlib.sha256(reading.document.raw).hexdigest(),
        text=reading.document.raw.decode(),
        entries=tuple(entries),
        comparisons=tuple(c for c in comparisons if c is not None),
        sources=reading.sources,
        tasks=reading.tasks,
    )


def _sources(reading: Reading, keys: SuiteKeys) -> None:
    reading.sources = load_table(folder("suites") / "sources.yaml")
    for index, row in enumerate(keys.sources):
        way: KeyPath = ("sources", index)
        if reading.document.is_emptied(way):
            continue
        try:
            source = parse_source(row, reading.base)
        except ValidationError as error:
            found = schema.explain(error, Source, reading.document, way)
            # What the row lacks was perhaps in what was cut of it.
            reading.problems += [p for at, p in found if at not in reading.document.cut]
            reading.wrong_sources.add(str(row.get("name")))
            continue
        # A cell_id holds the name alone, so a name must not come to stand for something else.
        if source.name in reading.sources:
            reading.problem(way, f"a second source named `{source.name}`", "rename it")
        reading.sources[source.name] = source


def _ways(reading: Reading, keys: SuiteKeys) -> list[tuple[KeyPath, KeyPath]]:
    """List (block, cell) of every entry; a block without cells is an entry itself."""
    ways: list[tuple[KeyPath, KeyPath]] = []
    for i, block in enumerate(keys.matrix or []):
        if block.cells is None and ("matrix", i, "cells") in reading.document.cut:
            continue
        inside: list[KeyPath] = [("matrix", i, "cells", j) for j in range(len(block.cells or []))]
        ways += [(("matrix", i), way) for way in inside or [("matrix", i)] if not reading.document.is_emptied(way)]
    return ways


def _no_equal_cells(reading: Reading, entries: list[SuiteEntry]) -> None:
    total = sum(map(expand.count, entries))
    if total > MOST_CELLS:
        reading.problem(("matrix",), f"{total} Cells; the most is {MOST_CELLS}", "shorten a list, or split the suite")
        return
    seen: dict[str, SuiteEntry] = {}
    for entry in entries:
        for cell in expand.cells(entry):
            first = seen.get(cell.cell_id)
            if first is not None:
                what = f"`{entry.id}` and `{first.id}` hold the same Cell, {cell.label}"
                reading.problems.append(Problem(entry.where, what, f"the other is at {first.where}"))
                break
            seen[cell.cell_id] = entry


def _comparison(reading: Reading, index: int, keys: ComparisonKeys) -> Compared | None:
    way: KeyPath = ("comparisons", index)
    before = len(reading.problems)
    sides = {"better": keys.better, "than": keys.than, "same-losses": keys.same_losses, "as": keys.as_}
    given = {key: ids for key, ids in sides.items() if ids is not None}
    is_pair = list(given) in (["better", "than"], ["same-losses", "as"])
    if not (is_pair and keys.says) and not any(gone[:2] == way for gone in reading.document.cut):
        form = "{better: ID, than: ID, says: SENTENCE} or {same-losses: ID, as: ID, says: SENTENCE}"
        reading.problem(way, "not a comparison", f"write {form}")
    # When entries or ids were taken out as wrong, one of them may be what is named here.
    lost = any(
        cut[:1] in ((), ("matrix",)) and (is_entry(cut) or cut[-1:] in ((), ("matrix",), ("cells",), ("id",)))
        for cut in reading.document.cut
    )
    for key, ids in given.items():
        for i, name in enumerate(ids):
            if name not in reading.ids and not lost:
                reading.problem((*way, key, i), f"`{key}` names no id: `{name}`", near(name, reading.ids, "ids"))
    if not is_pair:
        return None
    left, right = given.values()
    if set(left) & set(right):
        reading.problem(way, "a comparison of a thing with itself", "name different ids")
    _comparable(reading, way, keys, left, right)
    if len(reading.problems) > before or keys.says is None:
        return None
    return Compared("better" if keys.better else "same-losses", tuple(left), tuple(right), keys.says)


def _comparable(reading: Reading, way: KeyPath, keys: ComparisonKeys, left: list[str], right: list[str]) -> None:
    """Judge the two sides by what the entries say, which also those do that are wrong elsewhere."""
    sides = {name: entry for name, entry in reading.entries.items() if name in (*left, *right)}

    def is_known(name: str, *keys: str) -> bool:
        return not reading.unknown[name].intersection(keys)

    scored = [
        (*entry.task, entry.evaluation.items)
        for name, entry in sides.items()
        if entry.task and is_known(name, "task", "items")
    ]
    if keys.better and len({items for items in scored if items[-1] or tasks.SYNTHETIC in items}) > 1:
        reading.problem(way, "the two sides are not scored on the same items", "give them one task and one `items`")
    for name, entry in sides.items() if keys.better else ():
        if tasks.SYNTHETIC in (entry.task or ()):
            what = f"`better` compares accuracies, and `{name}` scores nothing: its task is {tasks.SYNTHETIC}"
            reading.problem(way, what, "compare Cells that are scored, or ask for `same-losses`")
    for name, entry in sides.items() if keys.same_losses else ():
        if name in right and set(entry.dtype) != {"float64"} and is_known(name, "dtype"):
            reading.problem(way, f"`as` names `{name}`, which is not float64", "compare with a float64 Cell")
        if entry.training.steps == 0 and is_known(name, "steps"):
            reading.problem(way, f"`{name}` does not train, so it has no losses", "compare Cells that train")
