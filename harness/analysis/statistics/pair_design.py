"""Design of an A/B comparison by pairs: numbers of pairs, looks at them, and levels of significance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.analysis.statistics.trimmed import cut
from harness.errors import UsageError

Stage = Literal["first", "fresh"]
FEWEST = 6
"""Fewest pairs: five allow no interval at 95 %, neither by order statistics nor by signed ranks."""


@dataclass(frozen=True)
class Design:
    """Numbers of pairs, looks at them, and levels of an alarm. The level bounds the false alarms under any
    symmetric noise. On steady machines, where the pairs spread little compared with the margin, false alarms are
    far rarer. Elsewhere, e.g. with a kernel that runs at one of two speeds in each process, they come near the
    level; the mde80 of such a Cell shows this."""

    first: int = 6
    """Pairs of every Cell."""
    fresh: tuple[int, ...] = (10, 20)
    """Total number of fresh pairs at each planned look."""
    levels: tuple[float, ...] = (0.001, 0.009)
    """Level of the alarm at each of these looks, one-sided and in each direction; their sum is the total level.
    The first look has few degrees of freedom, so its level is stricter."""
    slower_by: float = 0.01
    """Margin of a slow-down."""
    same_within: float = 0.03
    """Margin of an unchanged Cell."""
    interval: float = 0.95
    """Level of the interval that must lie within `same_within` to prove a Cell unchanged. There are up to three
    looks at a Cell; one that is slower by `same_within` is called unchanged in at most (1 - interval) / 2 of them
    each time."""
    suspect: float = 0.10
    """Level at which a change beyond `suspect_by` calls for fresh pairs."""
    suspect_by: float = 0.005
    """Margin of a suspicion."""
    trim: float = 0.25
    """Share trimmed at either end."""

    def __post_init__(self) -> None:
        """Raise UsageError for a design that cannot reach a verdict."""
        for count in (self.first, *self.fresh):
            if count < FEWEST or count % 2:
                raise _bad(f"{count} pairs: drift cancels between two pairs", f"an even number, {FEWEST} or more")
        if not self.fresh or any(b <= a for a, b in zip(self.fresh, self.fresh[1:], strict=False)):
            raise _bad(f"fresh pairs {self.fresh}", "how many there are in all at each look, e.g. (10, 20)")
        if len(self.levels) != len(self.fresh):
            raise _bad(f"{len(self.levels)} levels for {len(self.fresh)} looks at fresh pairs", "a level per look")
        for level in (*self.levels, sum(self.levels), self.interval, self.suspect):
            if not 0 < level < 1:
                raise _bad(f"a level of {level:g}", "levels between 0 and 1, those of the looks in sum too")
        if not 0 <= self.suspect_by <= self.slower_by < self.same_within < 1:
            raise _bad(
                f"margins {self.suspect_by:g}, {self.slower_by:g}, {self.same_within:g}",
                "0 <= suspect_by <= slower_by < same_within < 1",
            )
        if not 0 <= self.trim < 0.5 or any(n - 2 * cut(n, self.trim) < 3 for n in (self.first, *self.fresh)):
            raise _bad(f"a share of {self.trim:g} trimmed at either end", "a share that leaves 3 pairs or more")

    @property
    def level(self) -> float:
        """The level of the alarm over all looks, one-sided, in each direction."""
        return sum(self.levels)

    def looks(self, stage: Stage) -> tuple[int, ...]:
        """Return the numbers of pairs at which a stage may be judged."""
        return (self.first,) if stage == "first" else self.fresh


def _bad(what: str, wanted: str) -> UsageError:
    return UsageError(what, where="design of the pairs", hint=f"give {wanted}")
