"""The checks of a training loop, tried on loops that are right and on loops with a planted fault. They need no trl."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from harness.cell.loop_checks import checks, self_test
from harness.cell.loop_checks.faults import FAULTS, Clips, FaultyLoop, WarmsUpFromZero
from harness.cell.loop_checks.observed_training import Trainee
from harness.cell.loop_checks.settings import SettingTrials
from harness.cell.outcomes import Diverged
from harness.cell.training import loop
from harness.cell.training.batches import Batch
from harness.cell.training.loop import StepSamples
from harness.cell.training.loops import RefusedOptions, TrainingLoop
from harness.cli import main
from harness.conformance.findings.loop_settings import LoopSetting
from harness.conformance.findings.outcomes import CheckStatus
from harness.errors import Exit
from harness.methods.registry import Registry, discover

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


REFERENCES: dict[str, checks.ReferenceTrainings] = {}


def failed(train: object, trainee: Trainee, only: str = "") -> set[str]:
    reference = REFERENCES.setdefault(trainee.method, checks.ReferenceTrainings(trainee))
    trainings = checks.ComparedTrainings(trainee, train, reference)  # type: ignore[arg-type]
    names = [only] if only else list(checks.CHECKS)
    return {name for name in names if checks.outcome_of("a loop", name, trainings).status is CheckStatus.FAIL}


@pytest.mark.nightly
def test_every_planted_fault_is_caught_by_its_check_and_no_right_loop_is_accused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "--loop", "trl", "--self-test", "--json"]) == Exit.PASS
    document = json.loads(capsys.readouterr().out)
    assert document["faults"] == {fault.__name__: True for fault in FAULTS}
    assert document["wrong"] == []


@pytest.mark.nightly
def test_a_fault_that_no_check_catches_fails_the_self_test() -> None:
    class Harmless(FaultyLoop):
        caught_by = "order"

    report = self_test.run([Harmless])
    assert (report.exit, report.caught) == (Exit.FAIL, {"Harmless": False})


@pytest.mark.nightly
def test_a_fault_does_not_hide_in_the_consequences_of_another(registry: Registry) -> None:
    """A wrong schedule moves the weights, but the gradients are right at those weights."""
    trainee = Trainee("lora", "reference", "float32", registry)
    assert failed(WarmsUpFromZero(), trainee) == {"schedule", "losses", "weights"}
    assert failed(Clips(), trainee) >= {"gradients", "weights"}
    assert not failed(Clips(), trainee) & {"order", "schedule", "method_steps", "frozen_weights", "training_mode"}


def test_every_check_has_a_fault() -> None:
    assert {fault.caught_by for fault in FAULTS} == {*checks.CHECKS}


class Diverges(FaultyLoop):
    def _reported(self, losses: list[float], before: list[float]) -> float:
        raise Diverged("loss nan in step 1")


class TakesNoStep(FaultyLoop):
    def _ordered(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return []


def test_a_training_that_diverges_fails_the_check(registry: Registry) -> None:
    trainee = Trainee("lora", "reference", "float32", registry)
    trainings = checks.ComparedTrainings(trainee, Diverges(), checks.ReferenceTrainings(trainee))
    outcome = checks.outcome_of("a loop", "schedule", trainings)
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


@pytest.mark.parametrize(("runs", "status"), [(False, CheckStatus.SKIPPED), (True, CheckStatus.FAIL)])
def test_a_setting_that_needs_a_gpu_is_skipped_until_it_runs(
    runs: bool, status: CheckStatus, registry: Registry
) -> None:
    def train(*given: object, **options: object) -> StepSamples:
        if not runs:
            raise RuntimeError("0 active drivers")
        return FaultyLoop()(*given)  # type: ignore[arg-type]

    setting = LoopSetting(name="use_liger_kernel", config={"use_liger_kernel": True}, effect="untried")
    found = SettingTrials(registry, TrainingLoop("trl", train, loop.step, {"use_liger_kernel": False})).run(setting)
    outcome = found.outcome("trl")
    assert outcome.status is status
    assert runs or "0 active drivers" in outcome.result.detail


def test_an_option_that_the_library_does_not_have_fails_and_is_not_refused(registry: Registry) -> None:
    setting = LoopSetting(name="packs", config={"packs": True}, effect="refused")
    found = SettingTrials(registry, TrainingLoop("trl", loop.train, loop.step, {"packing": False})).run(setting)
    assert found.effect == "untried"
    assert "`packs`" in found.because
    assert found.outcome("trl").status is CheckStatus.FAIL
