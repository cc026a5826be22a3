"""Check of a few training steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.check_results import judged, prefix_tensor, skipped
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.optimizer_steps import DECAY, AdamW, bitsandbytes_problem, optimizer_of
from harness.conformance.comparison.tolerance_policies import Judgement, carried_noise, worst_of
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import Subject, attach_reference, load
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from harness.methods.spec import Adapted
from harness.records.record import CheckResult

STEPS = 3
RATES = (1.0, 0.5)
"""The learning rate of each step, as a multiple of the first step's. The steps take the multiples in turn."""


@check(States.WARM, in_minor_examples=False)
def check_trajectory(subject: Subject, case: Case) -> CheckResult:
    """After three optimizer steps of the whole model, every trainable tensor equals the float64 reference's.

    Each step has another gradient, adds the Method's own loss term, and ends with the Method's `after_step`. The
    learning rate of the second step is halved, as by a scheduler of torch. The optimizer is the Method's own, or torch's
    fused AdamW with weight decay. If the Method has no optimizer, a wide selection in float32 also takes the steps by
    bitsandbytes' AdamW without weight decay, if it is installed; sampled cases with more than one token do not.
    """
    if subject.dtype == "float64":
        return skipped(
            subject, case, "trajectory", "a float64 reference does not show how much the steps amplify rounding errors"
        )
    chosen = case.walks and subject.dtype == "float32" and subject.adapted.optimizer(1.0, 0.0) is None
    fresh, others = case.attach_again(), case.attach_again() if chosen else None
    if fresh is None or case.forward is None:
        return skipped(subject, case, "trajectory", "the case cannot attach again")
    start = {name: t.detach().clone() for name, t in subject.adapted.tensors().items()}
    state = {name: t.detach().clone() for name, t in subject.state().items()}
    forward = case.forward

    def end(model: nn.Module, adapted: Adapted, decay: float, adamw: AdamW = "fused") -> dict[str, Tensor]:
        model.eval()
        for path in adapted.layers:
            model.get_submodule(path).train(subject.trains_plainly)
        return _trained(model, adapted, forward, case, subject.dtype, adamw, decay)

    def end_of_reference(dtype: str, decay: float, seed: int | None = None) -> dict[str, Tensor]:
        """Train the reference in `dtype`, and return the trained tensors.

        seed: if given, every number at the start is moved at random by up to half a unit in the last place.
        """
        model = whole_model.base(fresh, dtype)
        adapted = attach_reference(fresh.method, model, fresh.config, None, torch.Generator().manual_seed(0))
        moved = start
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            moved = {name: perturbed(t.double(), dtype, generator).to(t.dtype) for name, t in start.items()}
        load(adapted, moved, state)
        return end(model, adapted, decay)

    def judge(trained: Subject, decay: float, adamw: AdamW = "fused") -> Judgement | None:
        """Train, and judge the trained tensors by the reference's. Return None if nothing trains."""
        load(trained.adapted, start, state)
        mine, truth = end(trained.model, trained.adapted, decay, adamw), end_of_reference("float64", decay)
        # One run in this dtype may happen to have almost no error. Further runs start within the dtype's rounding errors.
        draws = (end_of_reference(subject.dtype, decay, seed) for seed in (None, *range(PERTURBED_DRAWS)))
        factor = case.factor("trajectory")
        return carried_noise(mine, truth, draws, subject.dtype, factor) if truth else None

    verdict, detail = judge(fresh, DECAY), ""
    if verdict is None:
        return skipped(subject, case, "trajectory", "nothing trains")
    if others is not None and verdict.passed:
        if problem := bitsandbytes_problem(next(iter(start.values())).device):
            detail = f"without bitsandbytes: {problem}"
        else:
            # Without weight decay, which bitsandbytes applies after the update on CUDA, and before it on a CPU (its #2010).
            by_others = judge(others, 0.0, "bitsandbytes")
            assert by_others is not None  # noqa: S101  # the first run trained something
            verdict = worst_of([verdict, prefix_tensor("by bitsandbytes", by_others)], verdict.policy)
    return judged(subject, case, "trajectory", verdict, detail)


def _trained(
    model: nn.Module,
    adapted: Adapted,
    forward: Callable[[nn.Module], Tensor],
    case: Case,
    dtype: str,
    adamw: AdamW,
    decay: float,
) -> dict[str, Tensor]:
    """Train for STEPS steps, and return the trainable tensors. dtype: dtype of the subject."""
    parameters = list(dict.fromkeys(adapted.parameters()))  # the check `parameters` reports duplicates
    if not parameters:
        return {}
    optimizer = optimizer_of(adapted, parameters, dtype, adamw=adamw, decay=decay)
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:  # as a scheduler of torch does
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * RATES[(step - 1) % len(RATES)]
        optimizer.zero_grad()
        y = forward(model)
        dy = normal_noise(y.shape, case.generator(salt=90 + step))
        term = adapted.regularizer()
        y.backward(dy.to(y.device, y.dtype))
        if term is not None:
            term.backward()
        optimizer.step()
        adapted.after_step(step)
    return {name: t.detach().clone() for name, t in adapted.tensors().items()}
