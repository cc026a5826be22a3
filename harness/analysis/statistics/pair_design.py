"""Design of an A/B comparison: the order of its processes, how many pairs are judged, and at which level.

Each side (A and B, e.g. old and new code) runs a Cell in several processes. Two processes, one per side, form a pair.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from harness.analysis.statistics.intervals import fewest_with_interval
from harness.analysis.statistics.trimmed import cut
from harness.errors import UsageError, plural

Stage = Literal["first", "fresh"]
BLOCKS = ("ABBA", "BAAB")
FEWEST = fewest_with_interval()
"""Fewest pairs in a stage. Fewer allow no interval at 95 %, neither from order statistics nor from signed ranks."""


@dataclass(frozen=True)
class Design:
    """Sequential design of an A/B comparison: numbers of pairs, planned looks at the pairs, and significance levels.

    A look judges all pairs that were measured so far. An alarm is a verdict `slower` or `faster`. The level limits the
    rate of false alarms under any symmetric noise. On steady machines, the pairs vary little compared with the margin,
    and false alarms are far rarer. On other machines, the rate comes near the level, e.g. if a kernel runs at one of
    two speeds in each process. Such a Cell has a large `PairVerdict.mde80`.
    """

    first: int = 6
    """Number of pairs that every Cell gets in the first stage."""
    fresh: tuple[int, ...] = (10, 20)
    """Numbers of fresh pairs at which the second stage has a look, i.e. judges all fresh pairs so far."""
    levels: tuple[float, ...] = (0.001, 0.009)
    """One-sided significance level of the verdicts `slower` and `faster`, one for each look in `fresh`. The first level
    is stricter, because few pairs give few degrees of freedom."""
    slower_by: float = 0.01
    """Margin, as a share of A's time. A Cell is judged slower (or faster) only if a test shows that its slow-down (or
    speed-up) exceeds this margin."""
    same_within: float = 0.03
    """Largest change of a Cell, as a share of A's time, that counts as unchanged."""
    interval: float = 0.95
    """Confidence level of the interval of the change. A Cell is proven unchanged if this interval lies within
    `same_within`. If a Cell is slower by `same_within`, each look calls it unchanged with a probability of at most (1 -
    interval) / 2."""
    suspect: float = 0.10
    """Level of the test for a change of more than `suspect_by`. A Cell with a significant change needs fresh pairs."""
    suspect_by: float = 0.005
    """Largest change of a Cell, as a share of A's time, that is not suspicious."""
    trim: float = 0.25
    """Share of the pairs that the trimmed mean leaves out at either end."""

    def __post_init__(self) -> None:
        """Raise UsageError for invalid numbers of pairs, levels, margins or shares."""
        for count in (self.first, *self.fresh):
            if count < FEWEST or count % 2:
                raise _bad(
                    f"{count} pairs, but drift cancels only in blocks of two", f"an even number, {FEWEST} or more"
                )
        if not self.fresh or any(b <= a for a, b in zip(self.fresh, self.fresh[1:], strict=False)):
            raise _bad(f"fresh pairs {self.fresh}", "the total number at each look, in rising order, e.g. (10, 20)")
        if len(self.levels) != len(self.fresh):
            raise _bad(f"{len(self.levels)} levels for {len(self.fresh)} looks at fresh pairs", "a level per look")
        for level in (*self.levels, sum(self.levels), self.interval, self.suspect):
            if not 0 < level < 1:
                raise _bad(f"a level of {level:g}", "levels between 0 and 1, with a sum below 1 over the looks")
        if not 0 <= self.suspect_by <= self.slower_by < self.same_within < 1:
            raise _bad(
                f"margins {self.suspect_by:g}, {self.slower_by:g}, {self.same_within:g}",
                "0 <= suspect_by <= slower_by < same_within < 1",
            )
        if not 0 <= self.trim < 0.5 or any(n - 2 * cut(n, self.trim) < 3 for n in (self.first, *self.fresh)):
            raise _bad(f"a share of {self.trim:g} trimmed at either end", "a share that leaves at least 3 pairs")

    @property
    def level(self) -> float:
        """One-sided level of `slower`, over all looks at fresh pairs together. `faster` has the same level."""
        return sum(self.levels)

    def looks(self, stage: Stage) -> tuple[int, ...]:
        """Return the numbers of pairs at which a stage has a look, i.e. judges all its pairs so far."""
        return (self.first,) if stage == "first" else self.fresh


def _bad(what: str, wanted: str) -> UsageError:
    return UsageError(what, where="design of the pairs", hint=f"give {wanted}")


def order(pairs: int, seed: int) -> str:
    """Return the side (A or B) of each process, in blocks of two pairs, e.g. "ABBABAAB" for 4 pairs.

    A linear drift cancels within every block. The numbers of blocks that begin with A and with B differ by at most one,
    so a quadratic drift cancels between blocks. The order of the blocks is random, so that periodic noise favours no
    side. Raises UsageError unless `pairs` is even and at least 2.
    """
    if pairs < 2 or pairs % 2:
        raise UsageError(
            f"{plural(pairs, 'pair')} to order: drift cancels within blocks of two pairs",
            hint="request an even number of pairs",
        )
    rng = random.Random(seed)  # noqa: S311  # not for security
    blocks = pairs // 2
    first = rng.randrange(2)
    kinds = [BLOCKS[(first + i) % 2] for i in range(blocks)]
    rng.shuffle(kinds)
    return "".join(kinds)
