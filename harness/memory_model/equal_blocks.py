"""Count a model of many equal blocks from copies with one block and with two blocks.

Every count is a sum or a maximum over layers. So each block after the first adds the same number, and the two copies give
the exact count of the whole model. Counting a Llama with 80 blocks takes no longer than counting one with 32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

SMALL = (1, 2)
"""Numbers of blocks in the two copies."""


def find_blocks(model: nn.Module, head: Collection[str]) -> str:
    """Return the path of the longest list of equal blocks in a model, or "" if there is none.

    The list has more blocks than the copies of `SMALL`. Equal blocks have modules of the same types, names and sizes,
    and share no parameter. head: names of the head's parameters, which train as a whole. No block contains any of them.
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
    """Return whether a target may select a layer in some blocks only: the name contains the number of a block."""
    return any(part.isdecimal() for part in target.split("."))


def extrapolate(one: Any, two: Any, blocks: int) -> Any:
    """Return the count of a model with this number of blocks from the counts with one block and with two blocks.

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


def _are_equal(blocks: nn.ModuleList) -> bool:
    first, *others = map(_structure, blocks)
    parameters = [id(p) for block in blocks for p in block.parameters()]
    return all(other == first for other in others) and len(set(parameters)) == len(parameters)


def _structure(block: nn.Module) -> list[tuple[Any, ...]]:
    tensors = [(name, t.shape, t.dtype) for name, t in (*block.named_parameters(), *block.named_buffers())]
    return [*((name, type(module), module.extra_repr()) for name, module in block.named_modules()), *tensors]
