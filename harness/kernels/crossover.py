"""Crossovers: for each card, the largest size for which an Operation uses its fused kernel.

Above this size, another way to compute the Operation is expected to be faster:

| Operation         | size                     | other way                                            |
|-------------------|--------------------------|------------------------------------------------------|
| nf4_linear        | tokens                   | decode the whole weight, then multiply               |
| multi_lora_linear | tokens per used adapter  | one pair of products per adapter                     |
| lora_linear       | rank                     | one product for the weight, and products for A and B |

Both ways compute the same sums, but they round at different places.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from harness.kernels.card_tables import CROSSOVERS, Entry, card, tables

if TYPE_CHECKING:
    import torch


def crossover_of(operation: str, on: str, E: int) -> float:
    """Return the crossover of an Operation for a weight (E, D). Infinity means that all sizes use the fused kernel.

    on: name of the card, or empty for the CPU. A row of a table applies to weights whose E is at least the row's E. Of
    the rows that apply, the one with the largest E decides. If no row of a table applies, the next table decides.
    Raises ValueError for a table with a mistake.
    """
    return next(size for table in tables(on) for least, size in limits(table, operation) if least <= E)


@cache
def limits(table: Entry, operation: str) -> list[tuple[int, float]]:
    """Return a table's rows for an Operation as pairs (smallest E, crossover), with the largest E first.

    E is the number of outputs of a layer. The result is empty if the table lacks the Operation. Raises ValueError for a
    section without rows, a wrong or missing value, two rows with the same E, and an unknown key.
    """
    if operation not in table:
        return []
    section, size = table[operation], CROSSOVERS[operation]
    given = section["rows"]
    rows = given.items()
    if not rows:
        raise given.wrong("a list of at least one row")
    found = [(row["E"].integer(), _size(row[size])) for row in rows]
    given.check_distinct([E for E, _ in found], "E")
    section.check_keys(("standing", "meaning", "reasons", "rows", "times"))
    for row in rows:
        row.check_keys(("E", size))
    return sorted(found, reverse=True)


def _size(given: Entry) -> float:
    return math.inf if given.value is None else given.integer()


def is_lora_fused(rank: int, E: int, mask: torch.Tensor | None, device: torch.device) -> bool:
    """Return whether the fused Triton kernel computes a LoRA layer with E outputs.

    With a dropout mask, the result is True for every rank. The fused kernel then avoids a masked copy of x, and the
    crossover was measured without a mask. device: a device that supports Triton.
    """
    return mask is not None or rank <= crossover_of("lora_linear", card(device), E)
