"""Per card, the sizes up to which an Operation uses its fused kernel. Above them another way is expected to be faster.

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


def most(operation: str, on: str, E: int) -> float:
    """Return the largest size for which the fused kernel is used, for a weight of E rows. Infinity means all sizes.

    on: name of the card; empty for a CPU. In a table, the row with the largest E that the weight reaches decides. If a
    weight reaches no row, or if a table lacks the Operation, the next table decides. Raises ValueError for a table with
    a mistake.
    """
    return next(size for table in tables(on) for least, size in limits(table, operation) if least <= E)


@cache
def limits(table: Entry, operation: str) -> list[tuple[int, float]]:
    """Return the rows of a table for an Operation, as pairs of E and the size, the largest E first.

    Raises ValueError for a row that is not as expected, for two rows with the same E, and for an unknown key.
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
    """Return whether a LoRA layer of E outputs is computed by the fused products, on a device with Triton.

    With a mask it always is: the fused kernel then saves a copy of x, and the crossover was measured without a mask.
    """
    return mask is not None or rank <= most("lora_linear", card(device), E)
