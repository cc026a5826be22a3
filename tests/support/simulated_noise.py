"""Simulated times of process runs with realistic noise, and the two-stage gate for many Cells. It imports no torch.

The sizes of the noise come from a history on an L40S and from known GPU timings. The logarithm of a time is a sum of: a
shift of the session (sd 2 %), which both sides share; the noise of the process (sd 0.8 %); a warm-up of 1.5 % over the
session, fast at first; and the median of 30 autocorrelated steps (0.3, sd 1.5 %), of which 2 % are slow by 10 to 100 %.
In a given share of the processes, the whole process is slower by 5 to 20 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.analysis.statistics import pair_design
from harness.analysis.statistics.pair_design import Design
from harness.analysis.statistics.paired import look

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, int]], Floats]
SESSION, PROCESS, WARMING, STEP, FOLLOWING = 0.02, 0.008, 0.015, 0.015, 0.3
STEPS, SLOW_STEPS = 30, 0.02
ORDERS = 16
"""Number of orders of process runs that the simulated Cells share. Each order is drawn as a gate draws it."""


def disturbed(share: float) -> Noise:
    """Return a noise in which a `share` of the process runs is slow as a whole."""

    def noise(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
        own = rng.normal(0.0, PROCESS, shape) + _median_of_steps(rng, shape)
        hit = rng.random(shape) < share
        return own + np.where(hit, np.log1p(rng.uniform(0.05, 0.20, shape)), 0.0)

    return noise


def wider(factor: float) -> Noise:
    """Return a noise in which processes vary `factor` times as much, as on a machine with other users."""

    def noise(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
        return rng.normal(0.0, factor * PROCESS, shape) + _median_of_steps(rng, shape)

    return noise


def two_speeds(share: float, gap: float) -> Noise:
    """Return a noise in which a `share` of the processes runs in a mode that is slower by `gap`, e.g. after autotuning."""

    def noise(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
        return rng.normal(0.0, PROCESS, shape) + np.log1p(gap) * (rng.random(shape) < share)

    return noise


def heavy_tailed(df: float) -> Noise:
    """Return a noise with Student's t distribution."""
    return lambda rng, shape: PROCESS * rng.standard_t(df, shape)


def log_ratios(rng: np.random.Generator, cells: int, pairs: int, noise: Noise, effect: float = 0.0) -> Floats:
    """Return log(B / A), shape (cells, pairs), where B takes 1 + effect times as long as A."""
    arms = [pair_design.order(pairs, int(seed)) for seed in rng.integers(2**31, size=ORDERS)]
    is_b = np.array([[arm == "B" for arm in order] for order in arms])[rng.integers(ORDERS, size=cells)]
    when = np.arange(2 * pairs) / (2 * pairs)
    logs = noise(rng, (cells, 2 * pairs)) + rng.normal(0.0, SESSION, (cells, 1)) + WARMING * -np.expm1(-4 * when)
    logs += np.log1p(effect) * is_b
    by_pair, b_first = logs.reshape(cells, pairs, 2), is_b.reshape(cells, pairs, 2)[..., 0]
    return np.where(b_first, by_pair[..., 0] - by_pair[..., 1], by_pair[..., 1] - by_pair[..., 0])


@dataclass(frozen=True)
class Nights:
    """Counts of the verdicts on simulated Cells. runs: mean number of process runs per Cell."""

    cells: int
    suspects: int
    slower: int
    faster: int
    same: int
    runs: float

    def __add__(self, other: Nights) -> Nights:
        cells = self.cells + other.cells
        runs = (self.runs * self.cells + other.runs * other.cells) / cells
        counts = (getattr(self, name) + getattr(other, name) for name in ("suspects", "slower", "faster", "same"))
        return Nights(cells, *counts, runs)


def gate(rng: np.random.Generator, cells: int, design: Design, noise: Noise, effect: float = 0.0) -> Nights:
    """Judge many Cells in two stages, as `paired.decide` judges one Cell."""
    found = look(log_ratios(rng, cells, design.first, noise, effect), design, "first")
    same, slower, faster = int(found.same.sum()), 0, 0
    suspects = cells - same
    runs = 2 * design.first * cells
    pairs = np.empty((suspects, 0))
    for planned in design.fresh:
        more = planned - pairs.shape[1]
        pairs = np.hstack([pairs, log_ratios(rng, len(pairs), more, noise, effect)])
        runs += 2 * more * len(pairs)
        found = look(pairs, design, "fresh")
        slower, faster, same = (
            slower + int(found.slower.sum()),
            faster + int(found.faster.sum()),
            same + int(found.same.sum()),
        )
        pairs = pairs[~found.decided]
    return Nights(cells, suspects, slower, faster, same, runs / cells)


def many_nights(
    rng: np.random.Generator, cells: int, design: Design, noise: Noise, effect: float = 0.0, at_once: int = 5_000
) -> Nights:
    """Return the result of `gate` for many Cells, in portions of `at_once` Cells that fit into a cache."""
    found = Nights(0, 0, 0, 0, 0, 0.0)
    for begin in range(0, cells, at_once):
        found = found + gate(rng, min(at_once, cells - begin), design, noise, effect)
    return found


def _median_of_steps(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Return the median of the steps of each process, in the given shape.

    The steps lie along the first axis, since each step is correlated with the one before.
    """
    steps = rng.standard_normal((STEPS, *shape), dtype=np.float32)
    steps *= np.float32(STEP)
    fresh = np.float32(np.sqrt(1 - FOLLOWING**2))
    for k in range(1, STEPS):
        steps[k] *= fresh
        steps[k] += np.float32(FOLLOWING) * steps[k - 1]
    slow = rng.random(steps.shape, dtype=np.float32) < SLOW_STEPS
    steps[slow] += np.log1p(rng.uniform(0.1, 1.0, int(slow.sum()))).astype(np.float32)
    steps.partition((STEPS // 2 - 1, STEPS // 2), axis=0)
    return (steps[STEPS // 2 - 1].astype(np.float64) + steps[STEPS // 2]) / 2
