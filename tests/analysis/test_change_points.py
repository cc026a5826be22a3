"""Change points and the anchor: what they find, what they leave alone, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import betaincinv

from harness.analysis.statistics import anchor, change_points
from harness.analysis.statistics.change_points import FEWEST, LEVEL_NIGHTS
from support.simulated_nights import LEAST, NIGHT, simulated

Array = NDArray[np.float64]


def level(nights: int, at: int, by: float, seed: int = 0, sd: float = 0.006) -> Array:
    values = np.random.default_rng(seed).normal(0, sd, nights)
    values[at:] += math.log1p(by)
    return values


def test_a_step_is_found_where_it_is() -> None:
    (step,) = change_points.steps(level(40, 25, 0.05), least=LEAST)
    assert step.at == 25
    # Medians of 25 and 15 nights: each is off by less than five of its own standard errors.
    error = 5 * math.sqrt(math.pi / 2) * 0.006 * math.hypot(1 / math.sqrt(25), 1 / math.sqrt(15))
    assert -error < step.change - math.log1p(0.05) < error


def test_both_directions_and_a_level_that_comes_back() -> None:
    values = level(60, 20, 0.06)
    values[40:] -= math.log1p(0.06)
    up, down = change_points.steps(values, least=LEAST)
    assert (up.at, down.at) == (20, 40)
    assert up.change > 0 > down.change


@pytest.mark.parametrize("where", [0, 7, 19, 39])
def test_a_lone_spike_is_no_change_wherever_it_is(where: int) -> None:
    values = level(40, 40, 0.0)
    values[where] += 0.5
    assert change_points.steps(values, least=LEAST) == ()


def test_a_level_needs_three_nights() -> None:
    values = level(43, 40, 0.10)
    assert change_points.steps(values[: 40 + LEVEL_NIGHTS - 1], least=LEAST) == ()
    assert [step.at for step in change_points.steps(values, least=LEAST)] == [40]


def test_a_real_but_small_change_is_not_reported() -> None:
    values = level(60, 30, 0.018, sd=0.001)
    assert change_points.steps(values, least=LEAST) == ()
    assert len(change_points.steps(values, least=math.log1p(0.01))) == 1


def test_a_short_or_a_still_series_has_no_changes() -> None:
    assert change_points.steps(level(FEWEST - 1, 2, 0.5), least=LEAST) == ()
    assert change_points.steps(np.zeros(30), least=LEAST) == ()
    assert change_points.noise(np.zeros(1)) == 0


def test_the_noise_is_not_that_of_the_steps() -> None:
    calm, stepped = (change_points.noise(level(90, at, 0.5)) for at in (90, 45))
    # One difference of 89 is another: the median moves by a rank at most.
    ordered = np.sort(np.abs(np.diff(level(90, 90, 0.5)))) * 1.4826 / math.sqrt(2)
    assert ordered[43] <= calm <= ordered[45]
    assert ordered[43] <= stepped <= ordered[46]


def test_a_common_shift_is_the_anchor_and_is_divided_away() -> None:
    logs = np.random.default_rng(1).normal(0, 0.004, (50, 40)) + np.arange(50)[:, None]
    logs[:, 20:] += math.log(1.14)
    common = anchor.anchor(logs)
    assert [step.at for step in change_points.steps(common, least=LEAST)] == [20]
    assert all(change_points.steps(row, least=LEAST) == () for row in logs - common)
    assert any(change_points.steps(row, least=LEAST) for row in logs)


def test_few_series_have_no_anchor() -> None:
    logs = np.zeros((anchor.FEWEST_SERIES, 10))
    assert np.isfinite(anchor.anchor(logs)).all()
    assert np.isnan(anchor.anchor(logs[1:])).all()
    logs[0, 3] = np.nan
    assert np.flatnonzero(np.isnan(anchor.anchor(logs))).tolist() == [3]


def test_cells_that_came_later_do_not_move_the_anchor() -> None:
    # The machine became slower on night 35; on night 40 three times as many Cells came, which know nothing of it.
    logs = np.full((40, 60), np.nan)
    logs[:10] = 0.0
    logs[:10, 35:] = math.log(1.14)
    logs[10:, 40:] = 5.0
    relative = (logs - anchor.anchor(logs))[:10]
    assert (np.ptp(relative, axis=1) < LEAST).all()


def found_steps(logs: Array, first: int | None = None) -> list[list[int]]:
    """Return the places of each series' changes, or of the first ones', as `history detect` finds them on the last night."""
    relative = logs - anchor.anchor(logs)
    shared = float(np.median([change_points.noise(row) for row in relative]))
    return [[step.at for step in change_points.steps(row, least=LEAST, shared=shared)] for row in relative[:first]]


def at_least(found: int, of: int) -> float:
    """Return the exact lower 99 % bound of a share (Clopper and Pearson)."""
    return float(betaincinv(found, of - found + 1, 0.01)) if found else 0.0


def at_most(found: int, of: int) -> float:
    """Return the exact upper 99 % bound of a share."""
    return float(betaincinv(found + 1, of - found, 0.99)) if found < of else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("slower", [0.03, 0.05])
def test_a_slow_down_is_found_within_seven_nights(slower: float) -> None:
    found = tried = 0
    for seed in range(10):
        places = found_steps(simulated(seed, slower)[:, : NIGHT + 7], first=20)
        found += sum(any(abs(at - NIGHT) <= 2 for at in of) for of in places)
        tried += len(places)
    assert at_least(found, tried) > 0.95


@pytest.mark.nightly
def test_false_alarms_are_rarer_than_one_in_a_thousand_cell_nights() -> None:
    # Judged on every night anew, as a nightly job does; a change that was found the night before is not a second alarm.
    alarms = cell_nights = 0
    for seed in range(100, 102):
        logs = simulated(seed, 0.0)
        known: list[list[int]] = [[] for _ in logs]
        for night in range(FEWEST, logs.shape[1] + 1):
            for places, before in zip(found_steps(logs[:, :night]), known, strict=True):
                fresh = [at for at in places if all(abs(at - old) > 2 for old in before)]
                alarms += len(fresh)
                before += fresh
            cell_nights += len(logs)
    assert at_most(alarms, cell_nights) < 1e-3
