"""The checks of a training loop, tried on loops that are right and on loops with a planted fault. They need no trl."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from harness.cell.loop_checks import checks
from harness.cell.loop_checks.observed_training import Trainee
from harness.cell.loop_checks.settings import SettingTrials
from harness.cell.outcomes import Diverged
from harness.cell.training import loop
from harness.cell.training.batches import Batch
from harness.cell.training.loop import StepSamples
from harness.cell.training.loops import RefusedOptions, TrainingLoop
from harness.conformance.findings.loop_settings import LoopSetting
from harness.conformance.findings.outcomes import CheckStatus
from harness.methods.registry import Registry, discover
from support.faulty_loops import FAULTS, Clips, FaultyLoop, ForgetsTheMethodsTerm, WarmsUpFromZero

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


YARDSTICKS: dict[str, checks.Yardstick] = {}


def failed(train: object, trainee: Trainee, only: str = "") -> set[str]:
    yardstick = YARDSTICKS.setdefault(trainee.method, checks.Yardstick(trainee))
    evidence = checks.Evidence(trainee, train, yardstick)  # type: ignore[arg-type]
    names = [only] if only else list(checks.CHECKS)
    return {name for name in names if checks.outcome_of("a loop", name, evidence).status is CheckStatus.FAIL}


@pytest.mark.parametrize("train", [loop.train, FaultyLoop()], ids=["harness", "plain"])
def test_a_right_loop_passes_every_check(train: object, registry: Registry) -> None:
    assert failed(train, Trainee("adalora", "reference", "float32", registry)) == set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught_by_name(fault: type[FaultyLoop], registry: Registry) -> None:
    method = "adalora" if fault is ForgetsTheMethodsTerm else "lora"
    trainee = Trainee(method, "reference", "float32", registry)
    assert failed(fault(), trainee, fault.caught_by) == {fault.caught_by}


def test_a_fault_does_not_hide_in_the_consequences_of_another(registry: Registry) -> None:
    """A wrong schedule moves the weights, but the gradients are right at those weights."""
    trainee = Trainee("lora", "reference", "float32", registry)
    assert failed(WarmsUpFromZero(), trainee) == {"schedule", "losses", "weights"}
    assert failed(Clips(), trainee) >= {"gradients", "weights"}
    assert not failed(Clips(), trainee) & {"order", "schedule", "method_steps", "frozen_weights", "training_mode"}


def test_every_check_catches_a_fault() -> None:
    assert {fault.caught_by for fault in FAULTS} == {*checks.CHECKS}


class Diverges(FaultyLoop):
    def reported(self, losses: list[float], before: list[float]) -> float:
        raise Diverged("loss nan in step 1")


class TakesNoStep(FaultyLoop):
    def ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return []


def test_a_training_that_diverges_fails_the_check(registry: Registry) -> None:
    trainee = Trainee("lora", "reference", "float32", registry)
    evidence = checks.Evidence(trainee, Diverges(), checks.Yardstick(trainee))
    outcome = checks.outcome_of("a loop", "schedule", evidence)
    assert outcome.status is CheckStatus.FAIL
    assert "loss nan in step 1" in outcome.result.detail


def test_the_schedule_of_no_step_is_wrong(registry: Registry) -> None:
    assert failed(TakesNoStep(), Trainee("lora", "reference", "float32", registry), "schedule") == {"schedule"}


@pytest.mark.parametrize(
    ("error", "effect"),
    [(RefusedOptions("no"), "refused"), (Diverged("loss nan"), "changes"), (ValueError("a fault"), "untried")],
    ids=["refused", "diverged", "fault"],
)
def test_a_setting_that_ends_training_early_has_an_effect(error: Exception, effect: str, registry: Registry) -> None:
    def train(*_: object, **__: object) -> StepSamples:
        raise error

    setting = LoopSetting(name="packing", config={"packing": True}, effect="refused")
    found = SettingTrials(registry, TrainingLoop("trl", train, train, {"packing": False})).run(setting)
    assert found.effect == effect
    assert str(error) in found.because
    assert found.outcome("trl").status is (CheckStatus.PASS if effect == "refused" else CheckStatus.FAIL)


def test_an_option_that_the_library_does_not_have_fails_and_is_not_refused(registry: Registry) -> None:
    setting = LoopSetting(name="packs", config={"packs": True}, effect="refused")
    found = SettingTrials(registry, TrainingLoop("trl", loop.train, loop.step, {"packing": False})).run(setting)
    assert found.effect == "untried"
    assert "`packs`" in found.because
    assert found.outcome("trl").status is CheckStatus.FAIL
