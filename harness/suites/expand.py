"""Make the Cells of a suite, one for each combination of the values in an entry, and select Cells by an expression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError, did_you_mean
from harness.methods.spec import methods
from harness.records import naming
from harness.records.manifest import Comparison, Tuning
from harness.records.record import Cell

if TYPE_CHECKING:
    from harness.suites.entry import SuiteEntry
    from harness.suites.schema import ComparisonKeys


@dataclass(frozen=True)
class Plan:
    """The Cells of a suite, its comparisons, and its searches for learning rates."""

    cells: tuple[Cell, ...]
    """The Cells of the entries, followed by the Cells of the searches for learning rates."""
    ids: dict[str, str]
    """cell_id -> id of the Cell's entry."""
    comparisons: tuple[Comparison, ...]
    """All comparisons of the suite, even those whose Cells `select` has removed."""
    tuning: tuple[Tuning, ...] = ()
    """All searches of the suite, even those whose Cells `select` has removed."""


def expand(entries: Sequence[tuple[SuiteEntry, Sequence[Cell]]], comparisons: Sequence[ComparisonKeys]) -> Plan:
    """Return the plan of a suite. entries: the entries in the order of the file, each with its Cells."""
    found = {cell.cell_id: cell for _, cells in entries for cell in cells}
    ids = {cell.cell_id: entry.id for entry, cells in entries for cell in cells}
    of_entry = {entry.id: [cell.cell_id for cell in cells] for entry, cells in entries}
    tuning: list[Tuning] = []
    tried: dict[str, Cell] = {}
    for entry, cells in entries:
        for tuned, sweep in _searches(entry, cells):
            tuning.append(Tuning(entry=entry.id, cells=tuned, sweep=[cell.cell_id for cell in sweep]))
            for cell in sweep:
                tried.setdefault(cell.cell_id, cell)
                ids.setdefault(cell.cell_id, entry.id)
    return Plan(
        cells=(*found.values(), *tried.values()),
        ids=ids,
        comparisons=tuple(
            Comparison(kind=keys.kind, left=_of(keys.left, of_entry), right=_of(keys.right, of_entry), says=keys.says)
            for keys in comparisons
        ),
        tuning=tuple(tuning),
    )


def count(entry: SuiteEntry) -> int:
    """Return an upper bound for the number of Cells of an entry and of its searches, without making the Cells."""
    axes = (
        entry.model, entry.task, entry.base, entry.implementation, entry.environment, entry.serve, entry.optimizer,
        entry.dtype,
    )  # fmt: skip
    configs = sum(math.prod(len(values) for values in fields.values()) for fields in entry.config.values())
    searched = len(entry.tune.lr) if entry.tune else 0
    return math.prod(len(axis) for axis in axes) * configs * len(entry.training) * (len(entry.seed) + searched)


def cells(entry: SuiteEntry) -> Iterator[Cell]:
    """Yield the Cells of an entry. Of all axes, the seed varies fastest."""
    # Untimed seeds also have the prompts of the timed seed, so that all seeds have one recipe.
    evaluation = entry.evaluation.untimed() if entry.latency == "never" else entry.evaluation
    configs = [(method, config) for method, fields in entry.config.items() for config in _configs(fields)]
    codes = list(product(entry.implementation, entry.environment, entry.serve))
    for model, task, base, (method, config), (code, environment, serve), optimizer, dtype, training, seed in product(
        entry.model,
        entry.task,
        entry.base,
        configs,
        codes,
        entry.optimizer,
        entry.dtype,
        entry.training,
        entry.seed,
    ):
        timed = entry.latency == "every-seed" or (entry.latency == "first-seed" and seed == entry.seed[0])
        yield Cell(
            model=model, task=task, method=method, implementation=code, config=config, base=base,
            environment=environment, serve=serve, optimizer=optimizer, dtype=dtype, seed=seed, training=training,
            evaluation=evaluation.model_copy(update={"latency": timed}),
        )  # fmt: skip


def _of(entries: Sequence[str], cell_ids: Mapping[str, list[str]]) -> list[str]:
    return [cell_id for entry, own in cell_ids.items() if entry in entries for cell_id in own]


def _searches(entry: SuiteEntry, cells: Sequence[Cell]) -> list[tuple[list[str], list[Cell]]]:
    """Return a pair (cell_ids, sweep) for each search of an entry.

    cell_ids: ids of the Cells that use the result of the search. sweep: one Cell per learning rate. Some Cells become
    equal when the config of `tune` replaces theirs. Such Cells share a search.
    """
    tune = entry.tune
    if tune is None:
        return []
    found: dict[tuple[str, ...], tuple[list[str], list[Cell]]] = {}
    evaluation = entry.evaluation.untimed().model_copy(update={"items": tune.items, "skip": entry.evaluation.items})
    for cell in cells:
        # As in `cells`, keys have the order of the Method's fields, and None is left out.
        values = {**cell.config, **tune.config.get(cell.method, {})}
        config = {key: values[key] for key in entry.config[cell.method] if values.get(key) is not None}
        fixed = {"config": config, "seed": tune.seed, "evaluation": evaluation}
        sweep = [
            cell.model_copy(update={**fixed, "training": cell.training.model_copy(update={"lr": lr})}) for lr in tune.lr
        ]
        tuned, _ = found.setdefault(tuple(c.cell_id for c in sweep), ([], sweep))
        tuned.append(cell.cell_id)
    return list(found.values())


def _configs(fields: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*fields.values()):
        yield {name: value for name, value in zip(fields, values, strict=True) if value is not None}


def select(plan: Plan, expr: str) -> Plan:
    """Return the plan with only the Cells that `expr` selects.

    The terms of `expr` are separated by commas. A term `key=value` compares one key: id, model, task, method,
    implementation, environment, serve, base, optimizer, dtype, seed, lr, batch, max_tokens, accumulate, checkpointing,
    lr_ratio, compile, layerwise, loop, tune (true for Cells of a search), or a key of the config. A term without a key
    is the start of a cell_id, a part of the entry's id, or a part of the name that `plan` prints. For each key in
    `expr`, a Cell must match at least one of the terms with this key.

    Raises UsageError if `expr` is empty, if no Cell matches `expr` or one of its terms, or if a key is missing or
    unknown.
    """
    wanted: dict[str, list[str]] = {}
    for term in filter(None, (part.strip() for part in expr.split(","))):
        key, equals, value = (part.strip() for part in term.partition("="))
        if equals and not key:
            raise UsageError(f"`{term}` has no key", where=f"--only {expr}", hint="write key=value, or one word")
        wanted.setdefault(key if equals else "", []).append(value if equals else key)
    swept = {cell_id for tuning in plan.tuning for cell_id in tuning.sweep}
    # A Cell omits newer fields at their defaults, but an expression can still name these fields.
    later_defaults = {
        name: {key: knob.default for key, knob in info.fields.items() if knob.omit_default}
        for name, info in methods().items()
    }
    facts = {
        cell.cell_id: {
            **later_defaults.get(cell.method, {}),
            **_facts(cell, plan.ids[cell.cell_id]),
            "tune": cell.cell_id in swept,
        }
        for cell in plan.cells
    }
    names = naming.full(plan.cells)
    known = sorted({key for of_cell in facts.values() for key in of_cell})
    for key in wanted:
        if key and key not in known:
            raise UsageError(f"unknown key `{key}`", where=f"--only {expr}", hint=did_you_mean(key, known, "keys"))

    def has(cell: Cell, key: str, value: str) -> bool:
        fact = facts[cell.cell_id]
        return _is(fact.get(key), value) if key else _mentions(cell, fact["id"], names[cell.cell_id], value)

    def fits(cell: Cell) -> bool:
        return all(any(has(cell, key, value) for value in values) for key, values in wanted.items())

    selected = tuple(cell for cell in plan.cells if fits(cell))
    if selected:  # an alternative that fits no Cell is a mistake
        for key, value in ((key, value) for key, values in wanted.items() for value in values):
            if any(has(cell, key, value) for cell in plan.cells):
                continue
            term, hint = value, "remove this term"
            if key:
                values = {_shown(fact.get(key)) for fact in facts.values()} - {""}
                term, hint = f"{key}={value}", did_you_mean(value, sorted(values), f"`{key}` is")
            raise UsageError(f"no Cell fits `{term}`", where=f"--only {expr}", hint=hint)
    if not selected or not wanted:
        known_cells = [f"id={plan.ids[c.cell_id]}  {c.cell_id}  {names[c.cell_id]}" for c in plan.cells]
        shown = [*known_cells[:20], *([f"... and {len(known_cells) - 20} more"] if len(known_cells) > 20 else [])]
        hint = "choose from the Cells above, e.g. by a `key=value` or a part of a name"
        details = ["  Cells to choose from:", *(f"    {one}" for one in shown)]
        raise UsageError("no Cell fits", where=f"--only {expr}", hint=hint, details=details)
    return replace(plan, cells=selected, ids={c.cell_id: plan.ids[c.cell_id] for c in selected})


def _facts(cell: Cell, entry_id: str) -> dict[str, Any]:
    plain = ("model", "task", "method", "implementation", "environment", "serve", "optimizer", "dtype", "seed")
    return {
        **cell.config,
        **{key: getattr(cell, key) for key in plain},
        "id": entry_id,
        "base": cell.base.quantization,
        **{key: getattr(cell.training, key) for key in ("lr", "batch", "max_tokens", *cell.training.later_fields)},
    }


def _shown(fact: Any) -> str:
    return "" if fact is None else str(fact).lower() if isinstance(fact, bool) else str(fact)


def _is(fact: Any, value: str) -> bool:
    if isinstance(fact, list):
        return value in map(str, fact)
    if isinstance(fact, float):
        try:
            return fact == float(value)
        except ValueError:
            return False
    return str(fact).lower() == value.lower() if isinstance(fact, bool) else str(fact) == value


def _mentions(cell: Cell, entry_id: str, name: str, word: str) -> bool:
    return cell.cell_id.startswith(word) or word in entry_id or word in name
