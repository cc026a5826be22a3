"""Verdicts on one process run of a benchmark against saved runs: their rate of false alarms and their power."""

from __future__ import annotations

import math
import random

import pytest
from scipy import optimize, stats

from harness.analysis.statistics.intervals import POWER
from harness.analysis.statistics.process_runs import ALARM, ASSUMED, Pace, judge
from support.process_rounds import FIVE, rounds, runs


@pytest.mark.parametrize(
    ("new", "pace"),
    [(1e-3, Pace.NOT_SLOWER), (1.3e-3, Pace.SLOWER), (1.1e-3, Pace.INCONCLUSIVE), (0.6e-3, Pace.FASTER)],
)
def test_a_run_is_judged_by_the_spread_of_the_saved_ones(new: float, pace: Pace) -> None:
    found = judge(FIVE, rounds(new))
    assert found.pace is pace
    low, high = found.interval
    assert low < new / found.base - 1 < high
    assert f"5 saved runs; finds a slow-down of {100 * found.mde80:.0f} % with 80 % power" in found.sentence
    assert ("does it still do the same work?" in found.sentence) == (pace is Pace.FASTER)


def test_the_same_slow_down_is_no_finding_if_saved_runs_differ_as_much() -> None:
    unsteady = runs(1.0e-3, 1.3e-3, 0.8e-3, 1.2e-3, 0.9e-3)
    assert judge(unsteady, rounds(1.3e-3)).pace is Pace.INCONCLUSIVE


def test_the_margin_is_no_finding_and_may_be_chosen() -> None:
    assert judge(FIVE, rounds(1.08e-3), 0.01).pace is Pace.SLOWER
    assert judge(FIVE, rounds(1.08e-3), 0.2).pace is Pace.NOT_SLOWER


def test_fewer_than_three_runs_have_an_assumed_spread_and_say_so() -> None:
    found = judge(FIVE[:1], rounds(1.3e-3))
    assert found.pace is Pace.SLOWER
    assert f"a deviation of {100 * ASSUMED:g} % between runs is assumed" in found.sentence
    assert judge(FIVE[:1], rounds(1.2e-3)).pace is Pace.INCONCLUSIVE
    assert judge(FIVE[:1], rounds(1.3e-3, spread=1.0)).pace is Pace.INCONCLUSIVE  # rounds that are all over the place
    assert "assumed" not in judge(FIVE[:3], rounds(1.3e-3)).sentence


def test_runs_that_a_coarse_clock_makes_equal_are_not_taken_for_certain() -> None:
    found = judge([FIVE[0]] * 3, rounds(1.2e-3))
    assert found.pace is Pace.INCONCLUSIVE
    assert "is assumed (they do not differ)" in found.sentence
    assert judge([FIVE[0]] * 3, rounds(1.4e-3)).pace is Pace.SLOWER


@pytest.mark.slow
def test_at_the_margin_alarms_are_as_rare_as_the_level_and_what_it_finds_is_found() -> None:
    """Process runs that differ by 2 %, independently of each other."""
    drawn, sessions, sd, saved = random.Random(7), 400, 0.02, 4

    def alarms(slower: float) -> int:
        def run(seconds: float) -> list[float]:
            return [seconds * math.exp(drawn.gauss(0, sd))]

        found = [judge([run(1.0) for _ in range(saved)], run(slower)).pace for _ in range(sessions)]
        return found.count(Pace.SLOWER)

    def within(count: int, share: float) -> bool:  # but once in 1,000 by chance
        return abs(count - sessions * share) <= 3.3 * math.sqrt(sessions * share * (1 - share))

    assert alarms(1.0) == 0
    assert within(alarms(1.1), ALARM)
    # The slow-down that is found with 80 % power, by the noncentral t itself.
    error, critical = sd * math.sqrt(1 + 1 / saved), stats.t.ppf(1 - ALARM, saved - 1)
    beyond = optimize.brentq(lambda x: stats.nct.sf(critical, saved - 1, x / error) - POWER, 1e-6, 2)
    assert within(alarms(1.1 * math.exp(beyond)), POWER)


@pytest.mark.parametrize("saved", [3, 10])
def test_a_run_among_the_saved_ones_raises_no_alarm_under_any_noise(saved: int) -> None:
    """A process may have two speeds; the new run is as slow as the only slow saved one."""
    base = [1.0 + 0.001 * i for i in range(saved)]
    assert judge([[one] for one in base], [2.0]).pace is Pace.SLOWER
    assert judge([[one] for one in [*base[1:], 2.0]], [2.0]).pace is Pace.INCONCLUSIVE
