"""Verdict on interleaved pairs of processes, in two stages: B is slower than A, faster, the same, or undecided.

In the first stage, every Cell gets a few pairs. If they prove a Cell unchanged, that is its verdict. In the second
stage, every other Cell gets fresh pairs, and these alone decide. So the pairs that made a Cell suspicious are not
counted twice. A look judges all fresh pairs so far. The number of looks is planned, and the significance level of an
alarm (the verdict `slower` or `faster`) is divided among them. There is an alarm only if the change exceeds a margin.

All computations use log ratios. So if A and B are exchanged, `slower` and `faster` are exchanged, and nothing else
changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
"""Share by which a time may fall before the result is doubted: if B takes less than 70 % of A's time,
`PairVerdict.sentence` adds the question "does it still do the same work?"."""

NO_FRESH = "--no-fresh ran no fresh pairs, and only those can find a slow-down"
"""Reason why times stay undecided if the option --no-fresh switches off the fresh pairs."""


class PairFinding(StrEnum):
    """Verdict on the time of B compared with A."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Look:
    """Result of judging all Cells after n pairs of each Cell. Each array has one value per Cell."""

    seen: Trimmed
    """Trimmed means of the log ratios, and their errors."""
    p: Array
    """One-sided p value of the hypothesis that the true slow-down (or speed-up, whichever was observed) is at most
    `Design.slower_by`. For fresh pairs, it is multiplied by `Design.level` / (level of this look). So an alarm always
    has a p value of at most `Design.level`."""
    slower: Mask
    """True for each Cell that is slower."""
    faster: Mask
    """True for each Cell that is faster."""
    same: Mask
    """True for each Cell that is unchanged."""

    @property
    def decided(self) -> Mask:
        """True for each Cell with a verdict other than inconclusive."""
        return self.slower | self.faster | self.same


def look(log_ratios: Any, design: Design, stage: Stage) -> Look:
    """Judge the log ratios of all Cells at a planned look. `log_ratios` has the shape (..., n): n pairs of each Cell.

    The first stage calls no Cell slower or faster. Raises UsageError if no look at n pairs is planned, and HarnessError
    if a log ratio is not finite.
    """
    import numpy as np

    seen = trimmed(log_ratios, design.trim)
    if seen.n not in design.looks(stage):
        planned = " or ".join(str(n) for n in design.looks(stage))
        raise UsageError(
            f"no look at {seen.n} pairs of the {stage} stage is planned, and unplanned looks raise the rate of false alarms",
            hint=f"judge {planned} pairs, rerun the missing ones, or plan another Design",
        )
    if not np.isfinite(log_ratios).all():
        raise HarnessError("a log ratio is not finite", where="pairs", hint="compute log ratios of positive times")
    low, high = seen.interval(design.interval)
    bound = math.log1p(design.same_within)
    within = (low > -bound) & (high < bound) & ~seen.still
    margin, mild = math.log1p(design.slower_by), math.log1p(design.suspect_by)
    up, down = seen.beyond(margin), seen.mirrored.beyond(margin)
    suspected = np.minimum(seen.beyond(mild), seen.mirrored.beyond(mild)) <= design.suspect
    none = np.zeros_like(within)
    if stage == "first":
        return Look(seen, np.minimum(up, down), none, none, within & ~suspected)
    level = design.levels[design.fresh.index(seen.n)]
    slower, faster = up <= level, down <= level
    # A suspected Cell gets all planned pairs, even if it lies within `same_within`.
    same = within & ~slower & ~faster & (~suspected | (seen.n == design.fresh[-1]))
    return Look(seen, np.minimum(1.0, np.minimum(up, down) * design.level / level), slower, faster, same)


@dataclass(frozen=True)
class PairVerdict:
    """Verdict on the pairs of one Cell."""

    word: PairFinding
    """Kind of verdict."""
    stage: Stage
    """Stage whose pairs gave the verdict: `first` or `fresh`."""
    effect: float
    """Hodges-Lehmann estimate of B / A - 1, the relative change of the time."""
    interval: tuple[float, float]
    """Interval of B / A - 1 around the trimmed mean. The verdict `same` rests on it."""
    rank_interval: tuple[float, float] | None
    """Hodges-Lehmann interval of B / A - 1, which is valid for any symmetric noise. None if there are too few pairs."""
    p: float
    """One-sided p value of the hypothesis that the change is within the margin `Design.slower_by`. It is adjusted for
    several looks as `Look.p` explains."""
    n: int
    """Number of judged pairs of the stage."""
    mde80: float | None
    """Smallest slow-down that all planned looks together detect with 80 % power, given the spread of these pairs. None
    if the pairs have no spread, or if no fresh pairs run: only fresh pairs can prove a slow-down."""
    more: int
    """Number of fresh pairs to run before the pairs are judged again. 0 if the verdict is final."""
    sentence: str
    """Verdict as a sentence."""


def judge(log_ratios: Sequence[float], design: Design, stage: Stage, *, runs_fresh: bool = True) -> PairVerdict:
    """Judge the pairs of one Cell at one planned look.

    log_ratios: one value per pair. runs_fresh: False if fresh pairs are switched off (--no-fresh).
    """
    found = look([list(log_ratios)], design, stage)
    masks = {PairFinding.SLOWER: found.slower, PairFinding.FASTER: found.faster, PairFinding.SAME: found.same}
    word = next((word for word, mask in masks.items() if mask[0]), PairFinding.INCONCLUSIVE)
    middle, ranks = hodges_lehmann(log_ratios, design.interval)
    low, high = (math.expm1(float(end[0])) for end in found.seen.interval(design.interval))
    n, still = found.seen.n, bool(found.seen.still[0])
    more = 0
    if word is PairFinding.INCONCLUSIVE and runs_fresh:
        done = 0 if stage == "first" else n
        more = next((planned - done for planned in design.fresh if planned > done), 0)
    verdict = PairVerdict(
        word, stage, math.expm1(middle), (low, high), p=float(found.p[0]), n=n, more=more, sentence="",
        rank_interval=None if ranks is None else (math.expm1(ranks[0]), math.expm1(ranks[1])),
        mde80=None if still or not runs_fresh else math.expm1(reach(float(found.seen.scale[0]), design)),
    )  # fmt: skip
    return replace(verdict, sentence=_sentence(verdict, design, still=still, runs_fresh=runs_fresh))


def decide(first: Sequence[float], fresh: Sequence[float], design: Design, *, runs_fresh: bool = True) -> PairVerdict:
    """Return the verdict of the first planned look that decides. If none decides, return the verdict of the last look.

    first, fresh: log ratio of each pair of the first and the second stage. Fresh pairs are not read if they come after
    the deciding look, or are too few for the next planned look. runs_fresh: False if fresh pairs are switched off
    (--no-fresh). Then no Cell is called slower or faster.
    """
    found = judge(first, design, "first", runs_fresh=runs_fresh)
    for planned in design.fresh:
        if found.word is not PairFinding.INCONCLUSIVE or len(fresh) < planned:
            break
        found = judge(fresh[:planned], design, "fresh")
    return found


def family(verdicts: Mapping[str, PairVerdict]) -> dict[str, float]:
    """Return for each verdict the two-sided p value of a change, adjusted by Benjamini-Hochberg.

    verdicts: all verdicts of one report, by name. A verdict without fresh pairs counts with p = 1, since only fresh
    pairs can raise an alarm.
    """
    if not verdicts:
        return {}
    from scipy.stats import false_discovery_control

    p = [min(1.0, 2 * v.p) if v.stage == "fresh" else 1.0 for v in verdicts.values()]
    return dict(zip(verdicts, map(float, false_discovery_control(p)), strict=True))


def _sentence(v: PairVerdict, design: Design, *, still: bool, runs_fresh: bool) -> str:
    """Return a sentence that states a verdict and its evidence. still: True if the pairs have no spread."""
    pairs = f"{v.n} {'fresh ' if v.stage == 'fresh' else ''}pairs"
    if still:
        return (
            f"inconclusive: {_percent(v.effect)} without any spread over {pairs}: they are copies of one measurement, or "
            "the clock is too coarse; time more steps per process"
        )
    doubt = "; does it still do the same work?" if v.word is PairFinding.FASTER and v.effect < -IMPLAUSIBLE else ""
    more = f"; {v.more} fresh pairs decide" if v.more else ""
    if v.word is PairFinding.INCONCLUSIVE and not runs_fresh:
        more = f"; {NO_FRESH}"
    word = v.word.value
    if v.word in (PairFinding.SLOWER, PairFinding.FASTER):
        word += f" by more than {100 * design.slower_by:g} % at p = {v.p:.2g}"
    elif v.word is PairFinding.SAME:
        word = f"the same within {100 * design.same_within:g} %"
    low, high = v.interval
    measured = f"{_percent(v.effect)} [{_percent(low)}, {_percent(high)}] over {pairs}"
    if v.mde80 is not None:
        more += f"; a slow-down of {100 * v.mde80:.1f} % is found with {100 * POWER:.0f} % power"
    return f"{word}: {measured}{doubt}{more}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"
