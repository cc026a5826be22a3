"""Time to a target loss: which loss is the target, and when a recipe reaches it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from harness.analysis import choice, ranking, target_loss
from harness.analysis.ranking import RankingEntry
from harness.analysis.target_loss import TargetLoss
from harness.records.record import Outcome, Record
from support import recorded_run

CELL = recorded_run.cells()["fused"]


def _record(losses: list[float], seconds: float = 2.0, seed: int = 0) -> Record:
    """Return a Record with these losses; each of its steps took `seconds`."""
    cell = CELL.model_copy(update={"seed": seed})
    made = recorded_run.with_losses(recorded_run.record("fused", cell), losses)
    assert made.measurements is not None
    assert made.training is not None
    training = made.training.model_copy(update={"step_seconds": [seconds] * len(losses)})
    return made.model_copy(update={"measurements": made.measurements.model_copy(update={"training": training})})


def _entry(*runs: list[float]) -> RankingEntry:
    records = tuple(_record(losses, seed=seed) for seed, losses in enumerate(runs))
    return RankingEntry(records, ranking.score(records[:1]), "best")


FALLS, FALLS_LATE, STAYS = [4.0, 2.0, 0.0, 0.0], [4.0, 4.0, 2.0, 0.0], [4.0] * 4


def test_the_time_is_that_of_the_steps_up_to_the_first_mean_at_the_target() -> None:
    found = target_loss.time_to(_entry(FALLS), TargetLoss(loss=1.0, window=2))
    assert found is not None
    assert (found.steps, found.seconds) == (3, 6.0)  # the mean of 2 and 0
    assert (found.reached, found.seeds) == (1, 1)


def test_the_median_over_seeds_counts_a_seed_that_never_reached_the_target() -> None:
    to = TargetLoss(loss=1.0, window=2)
    most, half = (target_loss.time_to(_entry(*runs), to) for runs in ((FALLS, FALLS_LATE, STAYS), (FALLS, STAYS)))
    assert most is not None
    assert half is not None
    assert (most.seconds, most.reached, most.seeds) == (8.0, 2, 3)
    assert (half.seconds, half.reached, half.seeds) == (math.inf, 1, 2)


def test_a_loss_that_is_no_number_never_reaches_the_target() -> None:
    found = target_loss.time_to(_entry([4.0, math.nan, 0.0, 0.0]), TargetLoss(loss=1.0, window=2))
    assert found is not None
    assert found.reached == 0


def test_without_parity_there_is_no_time() -> None:
    entry = _entry(FALLS)
    first, *rest = entry.record.checks
    failed = entry.record.model_copy(update={"checks": [first.model_copy(update={"outcome": Outcome.FAIL}), *rest]})
    assert target_loss.time_to(replace(entry, records=(failed,)), TargetLoss(1.0, 2)) is None
    assert target_loss.time_to(replace(entry, records=(recorded_run.failed(entry.record),)), TargetLoss(1.0, 2)) is None


def test_every_recipe_near_the_top_reaches_the_target(tmp_path: Path) -> None:
    (group,) = ranking.groups(recorded_run.write_run(tmp_path / "r", only=["full", "reference", "fused", "head"]))
    chosen = choice.choose(group)
    assert chosen is not None
    to = target_loss.target(chosen)
    assert to is not None
    assert to.window == 6  # a tenth of 60 steps
    times = [target_loss.time_to(entry, to) for entry in chosen.near]
    assert len(times) == 3
    assert all(time is not None and time.reached == time.seeds for time in times)
    # The slowest of them reaches its own final loss in its last step at the latest, and another does so sooner.
    assert min(time.steps for time in times if time) < 60
    (below,) = [entry for entry in group.ranked if entry not in chosen.near]
    found = target_loss.time_to(below, to)
    assert found is not None
    assert found.seconds == math.inf  # the head alone learns slowly


@pytest.mark.parametrize(("steps", "window"), [(3, 3), (40, 5), (500, 50)])
def test_a_smoothed_loss_is_the_mean_of_a_tenth_of_the_steps(steps: int, window: int) -> None:
    entry = _entry([1.0] * steps)
    to = target_loss.target(choice.Choice(entry, entry, False, (entry,), 0, None))
    assert to == TargetLoss(1.0, window)
