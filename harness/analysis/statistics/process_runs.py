"""Verdict on the time of a benchmark in a new process (e.g. of pytest), compared with saved runs of older processes.

A run is one process that times the benchmark in several rounds. It is reduced to the median of its rounds. More rounds
would not predict the next process better, because the rounds of one process share its conditions (addresses, clocks,
neighbours). The new run is compared with the prediction interval of the saved runs, in log ratios: if nothing changed,
the new run is another sample from their distribution. Nothing is trimmed, since the new run may be disturbed too.

The level of the verdict holds for normal noise. Noise may be different: a process may run at one of two speeds, e.g.
because of its memory layout, and a few saved runs may all have the same speed. But under any noise, an unchanged run
lies beyond all n saved runs in only one of n + 1 sessions. With up to ten saved runs, only a run beyond all of them
raises an alarm.

The machine may have changed since the saved runs. Their spread does not show this, so the margin has to allow for it.
To find smaller differences, run old and new code in turn (see `paired`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist, fmean, median

from harness.analysis.statistics.intervals import LEVEL, POWER, median_interval
from harness.analysis.statistics.pair_power import FAR, found, least
from harness.analysis.statistics.paired import IMPLAUSIBLE
from harness.analysis.statistics.trimmed import single, trimmed
from harness.errors import plural

MARGIN = 0.10
"""Slow-down, as a share of the saved time, that a run must exceed to be judged slower. Sessions on one machine differ
by some per cent without a change."""
ALARM = 0.01
"""One-sided significance level of the verdicts `slower` and `faster`, for each benchmark separately."""
FEWEST = 3
"""Fewest saved runs from which a spread is estimated."""
ASSUMED = 0.05
"""Standard deviation between runs, as a share of their time. It is assumed if too few runs are saved or if they have no
spread. The verdict states it.

It was measured with five small kernels (add, copy, matmul, softmax, a Python loop) on a shared machine with two cores.
Over 14 runs, each kernel had a standard deviation between 0.9 % and 8.5 %; their root mean square was 5 %."""
_ROUNDS = 0.9
"""Confidence level of the interval of one run's median. The interval is used if the spread between runs is assumed. It
needs at least five rounds."""
_LARGEST = 700.0
"""Largest log ratio whose exponential is a finite float."""


class Pace(StrEnum):
    """Verdict on the speed of the timed code."""

    SLOWER = "slower"
    FASTER = "faster"
    NOT_SLOWER = "not slower"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class JudgedBenchmark:
    """Verdict on one benchmark."""

    pace: Pace
    """Kind of verdict."""
    base: float
    """Geometric mean of the saved runs' medians, in seconds."""
    new: float
    """Median of the new run, in seconds."""
    interval: tuple[float, float]
    """Confidence interval of new / base - 1 at the level LEVEL."""
    runs: int
    """Number of saved runs."""
    mde80: float
    """Smallest slow-down, as a share of the saved time, that is detected with a power of POWER."""
    sentence: str
    """Verdict as a sentence."""


def judge(saved: Sequence[Sequence[float]], new: Sequence[float], margin: float = MARGIN) -> JudgedBenchmark:
    """Judge a new run by comparing it with saved runs. saved, new: seconds of each round, above 0.

    The verdict is `slower` if new / saved exceeds 1 + margin, and `faster` if saved / new exceeds 1 + margin, each at
    the level ALARM. It is `not slower` if the whole interval of new / saved at LEVEL lies below 1 + margin. Otherwise
    it is `inconclusive`.
    """
    centres = [math.log(median(rounds)) for rounds in saved]
    n, limit, seconds, centre = len(saved), math.log1p(margin), median(new), fmean(centres)
    noise = _noise(saved, new, centres)
    change = math.log(seconds) - centre
    seen = single(change, noise.error, noise.df, n)
    low, high = (_share(float(end[0])) for end in seen.interval(LEVEL))
    p = {Pace.SLOWER: float(seen.beyond(limit)[0]), Pace.FASTER: float(seen.mirrored.beyond(limit)[0])}
    pace = next((pace for pace, chance in p.items() if chance <= ALARM), Pace.INCONCLUSIVE)
    if pace is Pace.INCONCLUSIVE and high < margin:
        pace = Pace.NOT_SLOWER
    far = limit + FAR * noise.unbiased
    mde80 = _share(least(lambda true: found((true - limit) / noise.unbiased, noise.df, ALARM), limit, far))
    sentence = f"{_verdict(pace, margin, p.get(pace, 1.0), change)}; {_evidence(n, noise.assumed, mde80)}"
    return JudgedBenchmark(pace, math.exp(centre), seconds, (low, high), n, mde80, sentence)


@dataclass(frozen=True)
class _Noise:
    """Standard error of the log ratio of the new run to the saved runs."""

    error: float
    unbiased: float
    """Another estimate of this standard error, which is unbiased even for few runs."""
    df: float
    assumed: bool


def _noise(saved: Sequence[Sequence[float]], new: Sequence[float], centres: Sequence[float]) -> _Noise:
    n = len(saved)
    if n >= FEWEST:
        seen = trimmed([list(centres)], 0.0)
        if not seen.still[0]:  # otherwise the clock is too coarse for a spread
            error, scale = float(seen.error[0]), float(seen.scale[0])
            return _Noise(error * math.sqrt(n + 1), scale * math.sqrt(1 + 1 / n), seen.df, assumed=False)
    within = _within(new) ** 2 + sum(_within(rounds) ** 2 for rounds in saved) / n**2
    error = math.sqrt(ASSUMED**2 * (1 + 1 / n) + within)
    return _Noise(error, error, math.inf, assumed=True)


def _within(rounds: Sequence[float]) -> float:
    """Return the standard error of the logarithm of one run's median. If the run has too few rounds, return ASSUMED."""
    seen = median_interval(rounds, _ROUNDS)
    if seen.low is None or seen.high is None:
        return ASSUMED
    return math.log(seen.high / seen.low) / (2 * NormalDist().inv_cdf(0.5 + _ROUNDS / 2))


def _verdict(pace: Pace, margin: float, p: float, change: float) -> str:
    by = f"by more than {100 * margin:g} %"
    if pace is Pace.INCONCLUSIVE:
        return f"neither slower {by} nor proven not to be"
    if pace is Pace.NOT_SLOWER:
        return f"not slower {by}"
    doubt = "; does it still do the same work?" if math.expm1(change) < -IMPLAUSIBLE else ""
    return f"{pace.value} {by} at p = {p:.1g}{doubt}"


def _evidence(n: int, assumed: bool, mde80: float) -> str:
    """Return a text with the number of saved runs, any assumption about their spread, and the detectable slow-down."""
    runs = plural(n, "saved run")
    if assumed:
        why = f"{FEWEST} runs are needed to measure it" if n < FEWEST else "they do not differ"
        runs += f", so a deviation of {100 * ASSUMED:g} % between runs is assumed ({why})"
    return f"{runs}; finds a slow-down of {100 * mde80:.0f} % with {100 * POWER:.0f} % power"


def _share(log_ratio: float) -> float:
    return math.expm1(min(log_ratio, _LARGEST))
