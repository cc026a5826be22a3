"""What the two-stage gate promises, over many simulated nights: false alarms, what is found, what is proven, the price."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from scipy.special import betaincinv

from harness.analysis.statistics.intervals import POWER
from harness.analysis.statistics.pair_design import Design
from harness.analysis.statistics.paired import PairFinding, decide, judge, look
from harness.analysis.statistics.trimmed import trimmed
from support import simulated_noise

pytestmark = pytest.mark.slow

DESIGN = Design()
SURE = 0.95
A_MONTH = 15_000
"""Cell-nights of 500 Cells in a month."""
CELLS = 4_000
USUAL, UNRULY, BUSY = simulated_noise.disturbed(0.0), simulated_noise.disturbed(0.03), simulated_noise.wider(3)
NOISES = {
    "usual": USUAL, "disturbed": UNRULY, "heavy-tailed": simulated_noise.heavy_tailed(2),
    "rarely slow": simulated_noise.two_speeds(0.1, 0.10), "two speeds": simulated_noise.two_speeds(0.3, 0.04),
    "a coin": simulated_noise.two_speeds(0.5, 0.05),
}  # fmt: skip


def at_most(count: int, of: int) -> float:
    """Return the exact binomial upper bound of a rate, one-sided."""
    return float(betaincinv(count + 1, of - count, SURE)) if count < of else 1.0


def at_least(count: int, of: int, sure: float = SURE) -> float:
    """Return the exact binomial lower bound of a rate, one-sided."""
    return float(betaincinv(count, of - count + 1, 1 - sure)) if count else 0.0


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("noise", "seed", "price"),
    [pytest.param(USUAL, 1, 16, marks=pytest.mark.nightly), (UNRULY, 2, 18)],
    ids=["usual", "disturbed"],
)
def test_unchanged_cells_alarm_less_than_once_a_month_and_are_proven(
    noise: simulated_noise.Noise, seed: int, price: float
) -> None:
    nights = simulated_noise.many_nights(np.random.default_rng(seed), 8 * A_MONTH, DESIGN, noise)
    assert at_most(nights.slower + nights.faster, nights.cells) < 1 / A_MONTH
    assert at_least(nights.same, nights.cells) >= 0.95
    assert nights.runs < price


@pytest.mark.parametrize(("noise", "seed"), [(USUAL, 3), (UNRULY, 4)], ids=["usual", "disturbed"])
def test_slow_downs_are_found(noise: simulated_noise.Noise, seed: int) -> None:
    rng = np.random.default_rng(seed)
    by_three = simulated_noise.many_nights(rng, CELLS, DESIGN, noise, 0.03)
    assert at_least(by_three.slower, CELLS) >= 0.95
    assert by_three.faster == 0
    # An interval at 95 % lies below the true +3 % in at most 2.5 % of the Cells, at each of three looks.
    assert at_least(by_three.same, CELLS) <= 3 * (1 - DESIGN.interval) / 2
    assert simulated_noise.many_nights(rng, CELLS, DESIGN, noise, 0.05).slower == CELLS


@pytest.mark.parametrize("noise", [USUAL, UNRULY], ids=["usual", "disturbed"])
def test_a_slow_down_within_the_margin_alarms_no_more_often_than_the_level(noise: simulated_noise.Noise) -> None:
    found = simulated_noise.many_nights(np.random.default_rng(5), CELLS, DESIGN, noise, DESIGN.slower_by)
    assert at_least(found.slower, CELLS) <= DESIGN.level


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_the_trimmed_t_holds_its_level_whatever_the_noise(noise: simulated_noise.Noise) -> None:
    cells = 5 * CELLS
    pairs = simulated_noise.log_ratios(np.random.default_rng(6), cells, DESIGN.fresh[-1], noise)
    tests = [(DESIGN.first, DESIGN.suspect), *zip(DESIGN.fresh, DESIGN.levels, strict=True)]
    tests += [(n, (1 - DESIGN.interval) / 2) for n in (DESIGN.first, *DESIGN.fresh)]
    all_sure = 1 - (1 - SURE) / (len(tests) * len(NOISES))  # for so many tests at once (Bonferroni)
    for n, level in tests:
        p = trimmed(pairs[:, :n], DESIGN.trim).beyond(0.0)
        assert at_least(int((p <= level).sum()), cells, all_sure) <= level, (n, level)


@pytest.mark.parametrize("noise", [*NOISES.values(), BUSY], ids=[*NOISES, "busy"])
def test_no_noise_makes_unchanged_cells_alarm_more_often_than_the_level(noise: simulated_noise.Noise) -> None:
    nights = simulated_noise.many_nights(np.random.default_rng(7), CELLS, DESIGN, noise)
    assert at_most(nights.slower + nights.faster, CELLS) <= 2 * DESIGN.level  # in each direction


def test_a_mean_without_trimming_overlooks_what_disturbed_processes_hide() -> None:
    rng = np.random.default_rng(8)
    pairs = simulated_noise.log_ratios(rng, CELLS, DESIGN.fresh[-1], UNRULY, 0.03)
    trimmed, plain = (int(look(pairs, design, "fresh").slower.sum()) for design in (DESIGN, Design(trim=0.0)))
    assert at_most(plain, CELLS) < at_least(trimmed, CELLS)


@pytest.mark.nightly
@pytest.mark.parametrize("noise", [USUAL, BUSY], ids=["usual", "busy"])
def test_a_detectable_slow_down_is_detected(noise: simulated_noise.Noise) -> None:
    """At the spread of the Cells, the mde80 is found at least as often as stated, and half of it less often."""
    rng = np.random.default_rng(9)
    for stage, n in (("first", DESIGN.first), ("fresh", DESIGN.fresh[0])):
        cells = [judge(d, DESIGN, stage) for d in simulated_noise.log_ratios(rng, 300, n, noise).tolist()]  # type: ignore[arg-type]
        reach = fmean(v.mde80 for v in cells if v.mde80 is not None)
        found = simulated_noise.many_nights(rng, 1_000, DESIGN, noise, reach)
        assert at_most(found.slower, found.cells) >= POWER
        less = simulated_noise.many_nights(rng, 1_000, DESIGN, noise, reach / 2)
        assert at_most(less.slower, less.cells) < POWER


def test_many_cells_at_once_get_the_verdicts_that_each_gets_alone() -> None:
    rng, cells = np.random.default_rng(10), 60
    seen = set()
    for effect in (-0.02, 0.0, 0.02, 0.03):
        first, fresh = (
            simulated_noise.log_ratios(rng, cells, n, UNRULY, effect) for n in (DESIGN.first, DESIGN.fresh[-1])
        )
        words = np.full(cells, PairFinding.INCONCLUSIVE, dtype=object)
        still_open = np.ones(cells, dtype=bool)
        for stage, pairs in (("first", first), *(("fresh", fresh[:, :n]) for n in DESIGN.fresh)):
            found = look(pairs, DESIGN, stage)  # type: ignore[arg-type]
            for word, mask in (
                (PairFinding.SLOWER, found.slower),
                (PairFinding.FASTER, found.faster),
                (PairFinding.SAME, found.same),
            ):
                words[still_open & mask] = word
            still_open &= ~found.decided
        alone = [decide(a, b, DESIGN).word for a, b in zip(first.tolist(), fresh.tolist(), strict=True)]
        assert alone == list(words)
        seen |= set(alone)
    assert seen == set(PairFinding)
