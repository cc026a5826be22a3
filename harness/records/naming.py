"""Make unique names for the Cells of a run: a label, plus the differing settings if several Cells share the label."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

from harness.records.record import Cell, Json

# Names of settings for which the last part of the path, e.g. `batch`, would be ambiguous.
_SHORT_KEYS = {
    "evaluation.batch": "evaluation batch",
    "base.implementation": "quantised by",
    "base.quantization": "base",
}

_TIMED = "evaluation.latency"


def full(cells: Iterable[Cell]) -> dict[str, str]:
    """Map each cell_id to a name that is unique among `cells`."""
    return _named(cells, lambda cell: cell.label, lambda cell: cell.label)


def in_group(cells: Iterable[Cell]) -> dict[str, str]:
    """Map each cell_id to a name without model and task. It is unique among the Cells with the same model and task."""
    return _named(cells, short, lambda cell: (cell.model, cell.task, short(cell)))


def recipes(cells: Iterable[Cell], *, inside: bool = False) -> dict[str, str]:
    """Map each recipe_id to one name for all Cells that differ only in the seed.

    inside: whether the names leave out model and task, like the names of `in_group`.
    """
    seedless = [cell.recipe for cell in {cell.recipe_id: cell for cell in cells}.values()]
    return in_group(seedless) if inside else full(seedless)


def short(cell: Cell) -> str:
    """Return a Cell's label without its model."""
    return cell.label.removeprefix(f"{cell.model} ")


def _named(cells: Iterable[Cell], name: Callable[[Cell], str], place: Callable[[Cell], Hashable]) -> dict[str, str]:
    """Map each cell_id to `name(cell)`, plus settings that distinguish the Cell.

    These are the settings that differ between Cells for which `place` returns the same value. A setting that a Cell
    does not set appears in its name only if two names would otherwise be equal.
    """
    sharing: dict[Hashable, dict[str, Cell]] = {}
    for cell in cells:
        sharing.setdefault(place(cell), {})[cell.cell_id] = cell
    found: dict[str, str] = {}
    for group in sharing.values():
        if len(group) == 1:
            found |= {i: name(cell) for i, cell in group.items()}
            continue
        where = {i: dict(_coordinates(cell.model_dump(mode="json"))) for i, cell in group.items()}
        keys = list(dict.fromkeys(key for values in where.values() for key in values))
        differing = [key for key in keys if len({values.get(key, "unset") for values in where.values()}) > 1]
        # Only one of several seeds has latencies. A name shows this fact only if nothing else differs.
        named = [key for key in differing if key != _TIMED]
        if len({tuple(values.get(key) for key in named) for values in where.values()}) == len(where):
            differing = named
        suffixes = {
            i: "".join(f" {_short_key(k)}={values[k]}" for k in differing if k in values) for i, values in where.items()
        }
        if len(set(suffixes.values())) < len(suffixes):  # e.g. two settings with the same last part, in different Cells
            suffixes = {
                i: "".join(f" {_short_key(k)}={v.get(k, 'unset')}" for k in differing) for i, v in where.items()
            }
        found |= {i: name(cell) + suffixes[i] for i, cell in group.items()}
    return found


def _coordinates(values: Mapping[str, Json], inside: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path of each setting, e.g. `training.batch`, and its value as text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _coordinates(value, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", _value(value)


def _value(value: Json) -> str:
    if isinstance(value, list):
        return "+".join(_value(v) for v in value) or "none"
    return "default" if value is None else str(value)


def _short_key(key: str) -> str:
    return _SHORT_KEYS.get(key, key.rpartition(".")[2])
