"""Compute the counts (bytes, parameters) of a model with many equal blocks from copies with one and with two blocks.

Every count is a sum or a maximum over layers. So each block after the first adds the same number, and the two copies
give the exact count of the whole model. Counting a Llama with 80 blocks takes no longer than counting one with 32.
Facts about named parts, such as layers, also follow from a few blocks, because each further block repeats the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import groupby
from typing import Any

from torch import nn

SMALL = (1, 2)
"""Numbers of blocks in the two copies of a model that are counted."""
Facts = tuple[Mapping[str, Any], ...]
"""Dicts that map names of a model's parts, such as layers or tensors, to values."""


def find_blocks(model: nn.Module, head: Collection[str]) -> str:
    """Return the path of the longest list of equal blocks in a model, or "" if there is none with more than two blocks.

    Equal blocks have modules of the same types, names and sizes, and share no parameter. head: names of the head's
    parameters, which train as a whole. No block contains any of them.
    """
    found = ""
    length = SMALL[-1]
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{path}.") for name in head):
            continue
        if len(module) > length and _are_equal(module):
            found, length = path, len(module)
    return found


def keep_blocks(model: nn.Module, path: str, number: int) -> None:
    """Remove all blocks from the list at `path`, except the first `number`."""
    blocks: Any = model.get_submodule(path)
    del blocks[number:]


def names_one_block(target: str) -> bool:
    """Return whether `target` contains the number of a block, so that it may select layers in some blocks only."""
    return any(part.isdecimal() for part in target.split("."))


def extrapolate(one: Any, two: Any, blocks: int) -> Any:
    """Return the count of a model with `blocks` blocks from the counts with one block (`one`) and with two (`two`).

    A count is a number, or a dict, list or tuple of counts. Anything else must be equal in both. Raises ValueError if
    the two counts do not have the same form.
    """
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {key: extrapolate(value, two[key], blocks) for key, value in one.items()}
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return type(one)(extrapolate(a, b, blocks) for a, b in zip(one, two, strict=True))
    if type(one) is int and type(two) is int:
        return one + (blocks - 1) * (two - one)
    if one == two:
        return one
    raise ValueError(f"one block counts as {one!r}, and two blocks count as {two!r}")


def named_facts(
    model: nn.Module, find: Callable[[], Facts], chosen: Collection[str] = ()
) -> tuple[dict[str, Any], ...]:
    """Return what `find()` returns for the whole model. If its blocks are equal, call `find` with few blocks only.

    `find` is called with two and with three blocks. If the facts about two blocks, extrapolated to three, agree with
    the facts about three, they are extrapolated to the whole model. Otherwise `find` is called with the whole model,
    and may raise its own errors.

    find: function that adapts the model, reads facts about its parts, and detaches the adapter. chosen: names of the
    parameters that `find` selects, e.g. by a regular expression. If they are not the same in each block, `find` is
    called with the whole model.
    """
    path = find_blocks(model, ())
    blocks: Any = model.get_submodule(path) if path else ()
    if path and _are_in_each_block(chosen, path, len(blocks)):
        two, three = (_found_in_first(model, path, number, find) for number in (2, 3))
        if two and three and _repeated(two, path, 3) == [list(one.items()) for one in three]:
            return tuple(map(dict, _repeated(two, path, len(blocks))))
    return tuple(map(dict, find()))


def _are_in_each_block(names: Collection[str], path: str, blocks: int) -> bool:
    """Return whether `names` selects the same parts in each of the blocks at `path`. blocks: number of these blocks."""
    inside = [name.removeprefix(f"{path}.").partition(".") for name in names if name.startswith(f"{path}.")]
    ends = {end for _, _, end in inside}
    return len({(number, end) for number, _, end in inside}) == blocks * len(ends)


def _found_in_first(model: nn.Module, path: str, number: int, find: Callable[[], Facts]) -> Facts:
    """Return what `find()` returns if the list at `path` has only its first `number` blocks.

    If `find` raises ValueError, return ().
    """
    parent, _, name = path.rpartition(".")
    owner: nn.Module = model.get_submodule(parent)
    blocks: Any = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(list(blocks)[:number]))
    try:
        return find()
    except ValueError:  # for example, a target is a layer of another block
        return ()
    finally:
        setattr(owner, name, blocks)


def _repeated(facts: Facts, path: str, blocks: int) -> list[list[tuple[str, Any]]]:
    """Extrapolate facts about a model with two blocks to a model with `blocks` blocks.

    facts: dicts of facts about the model with two blocks at `path`. Return the items of each extrapolated dict.
    """
    number = re.compile(rf"(?:^|(?<=\.)){re.escape(path)}\.(\d+)(?=\.|$)")

    def block(item: tuple[str, Any]) -> str:
        found = number.search(item[0])
        return found[1] if found else ""

    def copies(in_block: str, items: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for n in range(1, blocks) if in_block == "1" else [0]:
            for name, value in items:
                yield (number.sub(f"{path}.{n}", name, count=1) if n > 1 else name), value

    return [
        [item for in_block, run in groupby(one.items(), block) for item in copies(in_block, list(run))] for one in facts
    ]


def _are_equal(blocks: nn.ModuleList) -> bool:
    first, *others = map(_structure, blocks)
    parameters = [id(p) for block in blocks for p in block.parameters()]
    return all(other == first for other in others) and len(set(parameters)) == len(parameters)


def _structure(block: nn.Module) -> list[tuple[Any, ...]]:
    tensors = [(name, t.shape, t.dtype) for name, t in (*block.named_parameters(), *block.named_buffers())]
    return [*((name, type(module), module.extra_repr()) for name, module in block.named_modules()), *tensors]
