"""Verdict on interleaved pairs of process runs, in two stages: B is slower than A, faster, the same, or undecided.

Every Cell gets a few pairs. If they prove it unchanged, that is the verdict. Every other Cell (looks slower, looks faster,
undecided) gets fresh pairs, and these alone decide, so the pairs that made a Cell conspicuous are not counted twice. The
looks at the fresh pairs are planned, not after every pair, and share the level of the alarm. An alarm must lie beyond a
margin, in either direction: an unintended speed-up is a finding too.

Log ratios throughout, so that exchanging A and B exchanges `slower` and `faster` and changes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from harness.analysis.statistics.intervals import POWER
from harness.analysis.statistics.pair_design import Design, Stage
from harness.analysis.statistics.pair_power import reach
from harness.analysis.statistics.trimmed import Trimmed, hodges_lehmann, trimmed
from harness.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from harness.analysis.statistics.trimmed import Array, Mask

IMPLAUSIBLE = 0.3
"""Speed-up, as a share, from which the sentence asks if the code still does the same work."""


class PairFinding(StrEnum):
    """Verdicts on B against A."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Look:
    """Result of one look at n pairs of each Cell: arrays over the Cells, of the shape before the pairs' axis."""

    seen: Trimmed
    """Trimmed means and their errors."""
    p: Array
    """One-sided p value, towards the effect, of a change of at most `slower_by`. The p of a fresh look is weighted by
    its part of the level, so that at every look an alarm is a p of at most `Design.level`."""
    slower: Mask
    """Cells that are slower."""
    faster: Mask
    """Cells that are faster."""
    same: Mask
    """Cells that are unchanged."""

    @property
    def settled(self) -> Mask:
        """Cells with a verdict other than inconclusive."""
        return self.slower | self.faster | self.same


def look(log_ratios: Any, design: Design, stage: Stage) -> Look:
    """Judge log ratios of shape (..., n), with a planned n. The first stage calls no Cell slower or faster."""
    import numpy as np

    seen = trimmed(log_ratios, design.trim)
    if seen.n not in design.looks(stage):
        planned = " or ".join(str(n) for n in design.looks(stage))
        raise UsageError(
            f"{seen.n} pairs of the {stage} stage, and no look at so many is planned: looking whenever one likes inflates "
            "the false alarms",
            hint=f"judge {planned} pairs, rerun the missing ones, or plan another Design",
        )
    if not np.isfinite(log_ratios).all():
        raise HarnessError(
            "a log ratio that is no finite number", where="pairs", hint="make them of times, by `log_ratios`"
        )
    low, high = seen.interval(design.interval)
    bound = math.log1p(design.same_within)
    within = (low > -bound) & (high < bound) & ~seen.still
    margin, mild = math.log1p(design.slower_by), math.log1p(design.suspect_by)
    up, down = seen.beyond(margin), _downward(seen).beyond(margin)
    suspected = np.minimum(seen.beyond(mild), _downward(seen).beyond(mild)) <= design.suspect
    none = np.zeros_like(within)
    if stage == "first":
        return Look(seen, np.minimum(up, down), none, none, within & ~suspected)
    level = design.levels[design.fresh.index(seen.n)]
    slower, faster = up <= level, down <= level
    # A Cell that looks slower gets its remaining pairs, even if it lies within `same_within`.
    same = within & ~slower & ~faster & (~suspected | (seen.n == design.fresh[-1]))
    return Look(seen, np.minimum(1.0, np.minimum(up, down) * design.level / level), slower, faster, same)


@dataclass(frozen=True)
class PairVerdict:
    """Verdict on the pairs of one Cell."""

    word: PairFinding
    """Kind of verdict."""
    stage: Stage
    """Stage that decided."""
    effect: float
    """B / A - 1, by Hodges-Lehmann."""
    interval: tuple[float, float]
    """Interval of the trimmed mean, which decides."""
    rank_interval: tuple[float, float] | None
    """Hodges-Lehmann interval, for any symmetric noise; None if n is too small for one."""
    p: float
    """p value, see `Look`."""
    n: int
    """Pairs of this stage."""
    mde80: float | None
    """Smallest slow-down that all planned looks would have detected with 80 % power at this spread; None without
    any."""
    more: int
    """Fresh pairs to run before the next planned look; 0 without one."""
    sentence: str
    """Verdict as a sentence."""


def judge(log_ratios: Sequence[float], design: Design, stage: Stage) -> PairVerdict:
    """Judge the pairs of one Cell at one planned look."""
    found = look([list(log_ratios)], design, stage)
    word = PairFinding.INCONCLUSIVE
    for candidate, mask in (
        (PairFinding.SLOWER, found.slower), (PairFinding.FASTER, found.faster), (PairFinding.SAME, found.same),
    ):  # fmt: skip
        word = candidate if mask[0] else word
    middle, ranks = hodges_lehmann(log_ratios, design.interval)
    low, high = (math.expm1(float(end[0])) for end in found.seen.interval(design.interval))
    n, still = found.seen.n, bool(found.seen.still[0])
    mde80 = None if still else math.expm1(reach(float(found.seen.scale[0]), design))
    more = 0
    if word is PairFinding.INCONCLUSIVE:
        done = 0 if stage == "first" else n
        more = next((planned - done for planned in design.fresh if planned > done), 0)
    rank_interval = None if ranks is None else (math.expm1(ranks[0]), math.expm1(ranks[1]))
    effect, p = math.expm1(middle), float(found.p[0])
    said = _sentence(word, design, stage, n, more, effect, (low, high), p, mde80)
    return PairVerdict(word, stage, effect, (low, high), rank_interval, p, n, mde80, more, said)


def decide(first: Sequence[float], fresh: Sequence[float], design: Design) -> PairVerdict:
    """Return the verdict of one Cell from both stages: the verdict of the first planned look that decides, or of the last.

    fresh: empty, or enough pairs for at least one planned look. Pairs beyond the deciding look are not read.
    """
    found = judge(first, design, "first")
    for planned in design.fresh:
        if found.word is not PairFinding.INCONCLUSIVE or len(fresh) < planned:
            break
        found = judge(fresh[:planned], design, "fresh")
    return found


def family(verdicts: Mapping[str, PairVerdict]) -> dict[str, float]:
    """Return Benjamini-Hochberg adjusted p values of a change, in either direction, for the verdicts of one report.

    A Cell without fresh pairs counts with p = 1: its first pairs decided that it needed none.
    """
    if not verdicts:
        return {}
    from scipy.stats import false_discovery_control

    p = [min(1.0, 2 * v.p) if v.stage == "fresh" else 1.0 for v in verdicts.values()]
    return dict(zip(verdicts, map(float, false_discovery_control(p)), strict=True))


def _downward(seen: Trimmed) -> Trimmed:
    return Trimmed(-seen.mean, seen.error, seen.df, seen.n)


def _sentence(
    word: PairFinding,
    design: Design,
    stage: Stage,
    n: int,
    more: int,
    effect: float,
    interval: tuple[float, float],
    p: float,
    mde80: float | None,
) -> str:
    """Return a verdict and its evidence as a sentence."""
    pairs = f"{n} {'fresh ' if stage == 'fresh' else ''}pairs"
    if mde80 is None:
        return (
            f"inconclusive: {_percent(effect)} without any spread over {pairs}, so they are one measurement counted often, "
            "or the clock is too coarse; time more steps per process"
        )
    low, high = interval
    measured = f"{_percent(effect)} [{_percent(low)}, {_percent(high)}] over {pairs}"
    found = f"a slow-down of {100 * mde80:.1f} % is found with {100 * POWER:.0f} % power"
    beyond = f"by more than {100 * design.slower_by:g} % at p = {p:.2g}"
    if word is PairFinding.SLOWER:
        return f"slower {beyond}: {measured}; {found}"
    if word is PairFinding.FASTER:
        doubt = "; does it still do the same work?" if effect < -IMPLAUSIBLE else ""
        return f"faster {beyond}: {measured}{doubt}; {found}"
    if word is PairFinding.SAME:
        return f"the same within {100 * design.same_within:g} %: {measured}; {found}"
    then = f"; {more} fresh pairs decide" if more else ""
    return f"inconclusive: {measured}{then}; {found}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"
