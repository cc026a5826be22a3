"""Checks of a training loop. The docstring of each check states what a correct loop does.

A gradient is judged at the weights at which the loop computed it, so that earlier faults do not affect the comparison.
Losses and final weights are compared over the whole training, so a fault also shows in all later steps. The reference
is the Method's implementation in `reference/`. The harness's own loop is `harness.cell.training.loop`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from harness.analysis import trajectories
from harness.cell.loop_checks.observed_training import Observed, Trainee, batches, gradients_at, observe
from harness.cell.outcomes import CellOutcomeError
from harness.cell.training import loop, optimizers
from harness.cell.training.loop import StepSamples
from harness.conformance.comparison.tolerance_policies import Judgement, carried_noise
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.tolerance_constants import PERTURBED_DRAWS, TRAJECTORY_FACTOR
from harness.records.check import CheckId, CheckResult, Outcome

PARTS = 2
"""Number of parts of a batch in the check `accumulation`."""
_DRAWS = (None, *range(PERTURBED_DRAWS))


class ReferenceTrainings:
    """Training runs of the reference with the harness's own loop, in float64 and in the trainee's dtype.

    The checks compare these runs with a run of the loop under test. All implementations of a Method in one dtype are
    compared with the same runs.
    """

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee.of_reference(trainee.dtype)
        self._draws: list[Observed] = []

    @cached_property
    def truth(self) -> Observed:
        """The training run of the reference in float64."""
        return observe(loop.train, self._trainee.of_reference("float64"))

    def draws(self) -> Iterator[Observed]:
        """Yield training runs of the reference in the trainee's dtype. Each has different rounding errors."""
        for index, seed in enumerate(_DRAWS):
            if index == len(self._draws):
                self._draws.append(observe(loop.train, self._trainee, seed))
            yield self._draws[index]


@dataclass(frozen=True)
class ComparedTrainings:
    """The training runs that a check compares.

    `train` is the loop under test; it trains `trainee`. `reference` holds training runs of the reference with the
    harness's own loop.
    """

    trainee: Trainee
    train: Callable[..., StepSamples]
    reference: ReferenceTrainings

    @cached_property
    def whole(self) -> Observed:
        """The training run of the loop under test, without gradient accumulation."""
        return observe(self.train, self.trainee)

    @cached_property
    def parts(self) -> Observed:
        """The training run of the loop under test, with gradient accumulation over `PARTS` parts of each batch."""
        recipe = self.trainee.recipe.model_copy(update={"accumulate": PARTS})
        return observe(self.train, replace(self.trainee, recipe=recipe))


Findings = Judgement | list[str]
"""Result of a check: a judgement of numbers, or a list of what is wrong."""


def check_order(trainings: ComparedTrainings) -> Findings:
    """Each optimizer step sees all texts of one batch, and the loop keeps the order of batches and texts."""
    wanted = [
        [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(*map(b.inputs.get, _TEXTS), strict=True)]  # type: ignore[arg-type,union-attr]
        for b in batches(trainings.trainee.recipe)
    ]
    found = trainings.whole.rows
    odd = [f"{len(found)} optimizer steps, should be {len(wanted)}"] if len(found) != len(wanted) else []
    for step, (have, want) in enumerate(zip(found, wanted, strict=False), 1):
        if have != want:
            known = {text for batch in wanted for text in batch}
            how = "other texts" if set(have) != set(want) else "the same texts in another order"
            how = how if set(have) <= known else "texts that are not in the data, e.g. cut or joined"
            odd.append(f"step {step} saw {how}")
    return odd


_TEXTS = ("input_ids", "attention_mask")


def check_schedule(trainings: ComparedTrainings) -> Findings:
    """Each optimizer step has the learning rate of the recipe. In the warm-up the rate rises linearly to its peak, and is
    above zero in the first step. Then it falls linearly, and would be zero after the last step."""
    recipe, found = trainings.trainee.recipe, trainings.whole.rates
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=recipe.lr)
    schedule = optimizers.schedule(optimizer, recipe)
    odd = [f"{len(found)} optimizer steps, should be {recipe.steps}"] if len(found) != recipe.steps else []
    for step, rates in enumerate(found[: recipe.steps], 1):
        want = float(optimizer.param_groups[0]["lr"])
        if wrong := [rate for rate in rates if rate != want]:
            odd.append(f"step {step} has the learning rate {wrong[0]:.6g}, should be {want:.6g}")
        optimizer.step()
        schedule.step()
    return odd


def check_gradients(trainings: ComparedTrainings) -> Findings:
    """The optimizer gets the gradient of the mean loss over the answers' tokens plus the Method's own loss term.
    Nothing else is added to this gradient, and nothing clips or scales it."""
    return _gradients(trainings.trainee, trainings.whole)


def check_accumulation(trainings: ComparedTrainings) -> Findings:
    """With a batch in two parts, the optimizer gets the gradient of the whole batch. The parts are weighted by
    their numbers of answer tokens."""
    return _gradients(trainings.trainee, trainings.parts)


def _gradients(trainee: Trainee, seen: Observed) -> Findings:
    if len(seen.weights) != trainee.recipe.steps:
        return [f"{len(seen.weights)} optimizer steps, should be {trainee.recipe.steps}"]
    mine = {f"step {s} {name}": g for s, named in enumerate(seen.gradients, 1) for name, g in named.items()}
    truth = gradients_at(trainee, seen.weights, "float64", None)
    draws = (gradients_at(trainee, seen.weights, trainee.dtype, seed) for seed in _DRAWS)
    return carried_noise(mine, truth, draws, trainee.dtype)


def check_losses(trainings: ComparedTrainings) -> Findings:
    """The reported loss of every step equals the loss of the float64 reference in the harness's loop, within the noise
    of the dtype. The comparison `same-losses` in a suite has the same rule.
    """
    truth, mine = trainings.reference.truth.samples.losses, trainings.whole.samples.losses
    if len(mine) != len(truth):
        return [f"{len(mine)} losses, should be {len(truth)}"]
    noises: list[list[float]] = []
    judgement = Judgement(False, None, None, "", "", "", 0)
    for draw in trainings.reference.draws():
        noises.append([max(pair) for pair in zip(_errors(draw.samples.losses, truth), *noises[-1:], strict=True)])
        allowed = trajectories.allowed_errors(truth, noises[-1], trainings.trainee.dtype)
        errors = _errors(mine, truth)
        step = max(range(len(errors)), key=lambda t: errors[t] / allowed[t])
        finite = all(map(math.isfinite, mine))
        within = finite and errors[step] <= allowed[step]
        worst = f"step {step + 1}: {mine[step]:.9g}, should be {truth[step]:.9g}"
        policy = f"trajectory: {TRAJECTORY_FACTOR:g} x reference in {trainings.trainee.dtype}"
        judgement = Judgement(
            within, errors[step] if finite else None, allowed[step], "loss", worst, policy, 0 if finite else 1
        )
        if within:
            break
    return judgement


def _errors(losses: list[float], truth: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, truth, strict=True)]


def check_weights(trainings: ComparedTrainings) -> Findings:
    """After the last step, every trained tensor equals the same tensor of the float64 reference in the harness's loop,
    within the noise of the dtype.
    """
    draws = (draw.end for draw in trainings.reference.draws())
    return carried_noise(
        trainings.whole.end, trainings.reference.truth.end, draws, trainings.trainee.dtype, TRAJECTORY_FACTOR
    )


def check_method_steps(trainings: ComparedTrainings) -> Findings:
    """The loop calls the Method's `after_step`, e.g. AdaLoRA's pruning, once after each step, with the step's number."""
    want, found = list(range(1, trainings.trainee.recipe.steps + 1)), trainings.whole.method_steps
    return [] if found == want else [f"after_step was called for steps {found}, should be {want}"]


def check_frozen_weights(trainings: ComparedTrainings) -> Findings:
    """The loop changes no frozen tensor of the model."""
    return [f"{name} changed" for name in trainings.whole.changed]


def check_training_mode(trainings: ComparedTrainings) -> Findings:
    """The model is in training mode in every forward pass."""
    count = trainings.whole.in_evaluation
    return [f"{count} forward passes were in evaluation mode"] if count else []


CHECKS: dict[str, Callable[[ComparedTrainings], Findings]] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and inspect.isfunction(function)
}
"""Name of a check -> its function."""


def outcome_of(name: str, check: str, trainings: ComparedTrainings) -> CheckOutcome:
    """Run one check of a loop, and return its outcome. name: the loop's name."""
    trainee = trainings.trainee
    try:
        found = CHECKS[check](trainings)
    except CellOutcomeError as error:
        found = [f"training ends early: {error}"]
    return CheckOutcome(
        implementation=f"{trainee.implementation} in {name}",
        kind="method",
        target=trainee.method,
        dtype=trainee.dtype,
        case=f"tiny Llama, {trainee.recipe.steps} steps",
        result=_result(str(CheckId(trainee.method, check, trainee.dtype, "trained")), found),
    )


def _result(check: str, found: Findings) -> CheckResult:
    if isinstance(found, list):
        return CheckResult(
            check=check, outcome=Outcome.FAIL if found else Outcome.PASS, error=float(len(found)), allowed=0.0,
            policy="exact", detail="; ".join(found[:5]),
        )  # fmt: skip
    if not found.decided:
        return CheckResult(check=check, outcome=Outcome.SKIPPED, detail=found.worst)
    return CheckResult(
        check=check, outcome=Outcome.PASS if found.passed else Outcome.FAIL, error=found.error, allowed=found.allowed,
        tensor=found.tensor, worst=found.worst, policy=found.policy, nonfinite=found.nonfinite,
    )  # fmt: skip
