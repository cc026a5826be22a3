"""In which order the two arms of an A/B comparison run, and the log ratio of each pair of process runs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from harness.errors import HarnessError, UsageError

BLOCKS = ("ABBA", "BAAB")


def order(pairs: int, seed: int) -> str:
    """Return the arm of each process run, two per pair, in blocks of two pairs: "ABBABAAB...".

    What drifts linearly cancels within every block. As many blocks begin with A as with B (give or take one), so that what
    drifts quadratically cancels between them; which ones is drawn, so that nothing periodic can take a side.
    """
    if pairs < 2 or pairs % 2:
        raise UsageError(
            f"{pairs} pair{'s' * (pairs != 1)} to order: drift cancels within blocks of two pairs",
            mend="ask for an even number of pairs",
        )
    drawn = random.Random(seed)  # noqa: S311  # nothing is secret here
    blocks = pairs // 2
    first = drawn.randrange(2)
    kinds = [BLOCKS[(first + i) % 2] for i in range(blocks)]
    drawn.shuffle(kinds)
    return "".join(kinds)


def log_ratios(arms: str, seconds: Sequence[float]) -> list[float]:
    """Return log(B / A) of each pair: of process runs 0 and 1, 2 and 3, and so on.

    arms: as from `order`. seconds: what each process run took, e.g. the median of its steps; the step is no unit, since
    steps of one process share its luck.
    """
    if len(arms) != len(seconds):
        raise UsageError(
            f"{len(seconds)} times for {len(arms)} process runs",
            mend="give one time per process run; run both of a pair anew where one was lost",
        )
    for place, taken in enumerate(seconds):
        if not (math.isfinite(taken) and taken > 0):
            raise HarnessError(
                f"took {taken:g} s, which is no duration",
                where=f"process run {place + 1} of {len(seconds)} ({arms[place]})",
                mend="run its pair anew; time more steps per process if its clock did not move",
            )
    found = []
    for place in range(0, len(arms), 2):
        pair = arms[place : place + 2]
        if pair not in ("AB", "BA"):
            raise UsageError(
                f"pair {place // 2 + 1} is {pair!r}, not one run of each arm",
                mend="run the arms in the order that `order` gives",
            )
        a, b = seconds[place + pair.index("A")], seconds[place + pair.index("B")]
        found.append(math.log(b) - math.log(a))
    return found
