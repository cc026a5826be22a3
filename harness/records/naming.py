"""Names that tell the Cells of a run apart: their labels, and what else differs where two Cells share one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

from harness.records.record import Cell, Json

# Where the last word of a coordinate alone would be read as something else.
_SPOKEN = {"evaluation.batch": "evaluation batch", "base.implementation": "quantised by", "base.quantization": "base"}

_TIMED = "evaluation.latency"


def full(cells: Iterable[Cell]) -> dict[str, str]:
    """Map each cell_id to a name that no other of `cells` has: what a sentence calls a Cell."""
    return _named(cells, lambda cell: cell.label, lambda cell: cell.label)


def in_group(cells: Iterable[Cell]) -> dict[str, str]:
    """Map each cell_id to a name that no other Cell of its model and task has: where these two are named already."""
    return _named(cells, short, lambda cell: (cell.model, cell.task, short(cell)))


def recipes(cells: Iterable[Cell], *, inside: bool = False) -> dict[str, str]:
    """Map each recipe_id to a name: what Cells that differ in the seed alone are called together.

    inside: as by `in_group`, where model and task are named already.
    """
    seedless = [cell.recipe for cell in cells]
    return in_group(seedless) if inside else full(seedless)


def short(cell: Cell) -> str:
    """Return a Cell's label without its model."""
    return cell.label.removeprefix(f"{cell.model} ")


def _named(cells: Iterable[Cell], name: Callable[[Cell], str], place: Callable[[Cell], Hashable]) -> dict[str, str]:
    """Name Cells; to those of one place that would share a name, add the coordinates in which they differ, no others.

    A knob that a Cell leaves at its default is not named of that Cell.
    """
    sharing: dict[Hashable, dict[str, Cell]] = {}
    for cell in cells:
        sharing.setdefault(place(cell), {})[cell.cell_id] = cell
    found: dict[str, str] = {}
    for group in sharing.values():
        where = {i: dict(_coordinates(cell.model_dump(mode="json"))) for i, cell in group.items()}
        keys = list(dict.fromkeys(key for values in where.values() for key in values))
        told = [key for key in keys if len({values.get(key, "unset") for values in where.values()}) > 1]
        # Only one of several seeds has latencies, which is no difference worth a name; only where there is no other.
        named = [key for key in told if key != _TIMED]
        if len({tuple(values.get(key) for key in named) for values in where.values()}) == len(where):
            told = named
        apart = {i: "".join(f" {_spoken(k)}={values[k]}" for k in told if k in values) for i, values in where.items()}
        if len(set(apart.values())) < len(apart):  # knobs that end in one word, each set in another Cell
            apart = {i: "".join(f" {_spoken(k)}={v.get(k, 'unset')}" for k in told) for i, v in where.items()}
        found |= {i: name(cell) + apart[i] for i, cell in group.items()}
    return found


def _coordinates(values: Mapping[str, Json], inside: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _coordinates(value, f"{inside}{key}.")
        else:
            yield f"{inside}{key}", _value(value)


def _value(value: Json) -> str:
    if isinstance(value, list):
        return "+".join(_value(v) for v in value) or "none"
    return "default" if value is None else str(value)


def _spoken(key: str) -> str:
    return _SPOKEN.get(key, key.rpartition(".")[2])
