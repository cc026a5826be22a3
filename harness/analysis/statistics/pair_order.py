"""Order of the process runs of an A/B comparison."""

from __future__ import annotations

import random

from harness.errors import UsageError, plural

BLOCKS = ("ABBA", "BAAB")


def order(pairs: int, seed: int) -> str:
    """Return the side of each process run, two per pair, in blocks of two pairs: "ABBABAAB...".

    A linear drift cancels within every block. As many blocks begin with A as with B (give or take one), so a quadratic
    drift cancels between blocks. The order of the blocks is random, so that periodic noise favours no side.
    """
    if pairs < 2 or pairs % 2:
        raise UsageError(
            f"{plural(pairs, 'pair')} to order: drift cancels within blocks of two pairs",
            hint="ask for an even number of pairs",
        )
    drawn = random.Random(seed)  # noqa: S311  # nothing is secret here
    blocks = pairs // 2
    first = drawn.randrange(2)
    kinds = [BLOCKS[(first + i) % 2] for i in range(blocks)]
    drawn.shuffle(kinds)
    return "".join(kinds)
