"""A/A canaries: comparisons of a version of the code with itself. They measure how often a gate gives a false alarm.

If the rate of false alarms is too high, the gate is closed: it judges no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.analysis.statistics.intervals import LEVEL, wilson
from harness.analysis.statistics.trimmed import trimmed
from harness.errors import UsageError

NOMINAL = 0.05
LARGEST_EXCESS = 3.0
"""Largest accepted rate of false alarms, as a multiple of the nominal rate."""


@dataclass(frozen=True)
class Canaries:
    """Counts of canaries (A/A runs) and of their false alarms."""

    alarms: int
    """Number of canaries that raised a false alarm."""
    runs: int
    """Number of canaries."""
    nominal: float = NOMINAL
    """Expected share of canaries with an alarm: the level of the test."""

    def __post_init__(self) -> None:
        """Raise UsageError for impossible counts."""
        if not 0 <= self.alarms <= self.runs or not 0 < self.nominal < 1:
            raise UsageError(
                f"{self.alarms} alarms of {self.runs} A/A canaries, nominally {self.nominal:g}",
                hint="count each canary once, and pass the level of its test",
            )

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the rate of false alarms."""
        return wilson(self.alarms, self.runs)

    @property
    def limit(self) -> float:
        """Largest accepted rate of false alarms."""
        return min(1.0, LARGEST_EXCESS * self.nominal)

    @property
    def closed(self) -> bool:
        """True if the gate is closed: the rate of false alarms is significantly above the largest accepted rate."""
        return self._closes(self.alarms)

    @property
    def sentence(self) -> str:
        """Sentence that states the rate of false alarms and its consequence."""
        if not self.runs:
            return "no A/A canaries: the rate of false alarms of this gate is unknown here"
        low, high = self.interval
        share = f"{100 * self.alarms / self.runs:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        noun = "canary" if self.runs == 1 else "canaries"
        rate = f"{self.alarms} of {self.runs} A/A {noun} alarmed: {share}, nominally {100 * self.nominal:g} %"
        if self.closed:
            return (
                f"{rate}. This is more than {LARGEST_EXCESS:g} times nominal, so the gate is closed: look for other load, "
                "unsteady clocks, or pairs that did not share a device"
            )
        return rate if self._closes(self.runs) else f"{rate}; too few to close the gate"

    def _closes(self, alarms: int) -> bool:
        if not alarms:
            return False
        from scipy.special import betainc  # the binomial tail, for counts of any size

        return bool(betainc(alarms, self.runs - alarms + 1, self.limit) <= 1 - LEVEL)


def canaries(log_ratios: Iterable[Sequence[float]], trim: float, nominal: float = NOMINAL) -> Canaries:
    """Count the canaries and their alarms. An alarm means that the log ratios differ from 0 at the level `nominal`.

    log_ratios: for each canary, the log ratio of each pair of processes. trim: share of the pairs that is trimmed at
    either end. The test is two-sided. Unlike the gate's test, it has no margin: a margin would hide noise of twice the
    expected size.
    """
    alarms = []
    for pairs in log_ratios:
        seen = trimmed([list(pairs)], trim)
        up = float(seen.beyond(0.0)[0])
        alarms.append(not bool(seen.still[0]) and 2 * min(up, 1 - up) <= nominal)
    return Canaries(sum(alarms), len(alarms), nominal)
