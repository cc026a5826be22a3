"""Checks that need no reference: they compare the adapted model with itself and with the base model.

They are for adapters of HF peft that have no reference implementation here. Suites call these `method: peft`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import CellStage, Reference, check
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.check_results import from_problems, judged, skipped
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.normal_noise import noise_for, normal_noise
from harness.conformance.subject import Subject, is_small
from harness.errors import UsageError
from harness.methods.peft_config import NO_REFERENCE
from harness.methods.spec import Adapted
from harness.process.out_of_memory import shortage
from harness.records.record import CheckResult

_NUDGE = 0.05
"""Factor of the noise that is added to a tensor. The noise then moves a tensor about as far as training does."""
_TOO_LARGE = "the model is too large to be copied"


class Unreferenced(Adapted, Protocol):
    """An adapter without a reference, attached by `method: peft`. It may be of any type that its library offers."""

    starts_as_base: bool
    """True if the library promises that the output at the start equals the base model's output."""
    bases: Callable[[], Mapping[str, nn.Module]]
    """Function that returns the original layers inside the adapted layers, by path."""
    reloaded: Callable[[nn.Module], nn.Module]
    """Function that saves the adapter, loads it into a given base model, and returns this model."""


def nudged(subject: Subject, generator: torch.Generator) -> Subject:
    """Return a copy of the subject with noise added to every trainable tensor.

    Without noise, some gradients at the start are zero. In LoRA, for example, A gets a gradient of zero while B is zero.
    """
    adapted = copy.deepcopy(cast("Unreferenced", subject.adapted))
    with torch.no_grad():
        for tensor in adapted.tensors().values():
            tensor.add_((noise_for(tensor, generator) * _NUDGE).to(tensor))
    return replace(subject, model=adapted.model, adapted=adapted)


@check(in_cell=[CellStage.ATTACHED], reference=Reference.ABSENT)
def check_reference(subject: Subject, case: Case) -> CheckResult:
    """The Method has a reference to compare with.

    An adapter without a reference (`method: peft`) skips this check. Reports show no times for it, and only the checks
    that need no reference try it.
    """
    return skipped(subject, case, "reference", NO_REFERENCE)


@check(in_cell=[CellStage.START], reference=Reference.ABSENT)
def check_start(subject: Subject, case: Case) -> CheckResult:
    """If the adapter's library promises it, the adapted model at its start computes what the base model computes.

    The outputs are equal to the last bit, or differ by at most twice the rounding error of the base model in its dtype.
    """
    adapted = cast("Unreferenced", subject.adapted)
    if not adapted.starts_as_base:
        return skipped(subject, case, "start", "this method or its config does not start as the base model")
    mine, base = {"logits": _run(case, subject.model)}, {"logits": _base_output(case)}
    if (same := exact(mine, base)).passed:
        return judged(subject, case, "start", same, "to the last bit")
    if subject.original.model is None:
        return skipped(subject, case, "start", f"not to the last bit, and {_TOO_LARGE}")
    truth = {"logits": _run(case, whole_model.copied(subject.original.model, torch.float64).eval())}
    return judged(subject, case, "start", noise_floor(mine, truth, base, subject.dtype, case.factor("start")))


@check(in_cell=[CellStage.START, CellStage.WARM], reference=Reference.ABSENT)
def check_repeats(subject: Subject, case: Case) -> CheckResult:
    """Two runs of the whole model on the same texts give the same logits and gradients, to the last bit. All are finite."""
    one, again = (_observed(subject, case) for _ in range(2))
    if odd := [f"{name} is not finite" for name, tensor in one.items() if not bool(tensor.isfinite().all())]:
        return from_problems(subject, case, "repeats", odd)
    return judged(subject, case, "repeats", exact(one, again))


@check(in_cell=[CellStage.WARM], reference=Reference.ABSENT)
def check_untouched(subject: Subject, case: Case) -> CheckResult:
    """A forward and a backward pass of the whole model change no weight and no buffer."""
    before = {name: t.detach().clone() for name, t in whole_model.tensors(subject.model).items()}
    _observed(subject, case)
    return judged(subject, case, "untouched", exact(whole_model.tensors(subject.model), before))


@check(in_cell=[CellStage.WARM], reference=Reference.ABSENT)
def check_reached(subject: Subject, case: Case) -> CheckResult:
    """After noise is added to the adapter, every trainable tensor gets a finite gradient that is not all zero.

    A tensor that only scales a bias of zeros gets a gradient of zero. If a small model has such a tensor, the check runs
    again with noise in place of frozen parameters that are all zero.
    """
    problems = _unreached(subject, case)
    if problems and is_small(subject.model):
        remaining = _unreached(_without_zeros(subject, case.generator(salt=5)), case)
        problems = {name: problem for name, problem in problems.items() if name in remaining}
    if problems and all("trainable_tokens" in name for name in problems):
        message = "no text of the task contains a token that the adapter_config trains"
        raise UsageError(message, where=subject.method, hint="name tokens that the task's texts contain")
    return from_problems(subject, case, "reached", list(problems.values()), f"{len(subject.adapted.tensors())} tensors")


def _unreached(subject: Subject, case: Case) -> dict[str, str]:
    """Return a message for each trainable tensor whose gradient is missing, zero or not finite, by the tensor's name."""
    seen, problems = _observed(subject, case), {}
    for name in subject.adapted.tensors():
        gradient = seen.get(f"grad {name}")
        if gradient is None:
            problems[name] = f"{name} gets no gradient"
        elif not bool(gradient.any()):
            problems[name] = f"the gradient of {name} is zero"
        elif not bool(torch.isfinite(gradient).all()):
            problems[name] = f"the gradient of {name} is not finite"
    return problems


@torch.no_grad()
def _without_zeros(subject: Subject, generator: torch.Generator) -> Subject:
    """Return a copy of the subject in which no frozen parameter is all zero."""
    adapted = copy.deepcopy(cast("Unreferenced", subject.adapted))
    trains = {id(t) for t in adapted.tensors().values()}
    for parameter in adapted.model.parameters():
        if id(parameter) not in trains and parameter.is_floating_point() and not bool(parameter.any()):
            noise = normal_noise(parameter.shape, generator) * _NUDGE
            parameter.copy_(noise.to(parameter))
    return replace(subject, model=adapted.model, adapted=adapted)


@check(in_cell=[CellStage.WARM], reference=Reference.ABSENT)
def check_reload(subject: Subject, case: Case) -> CheckResult:
    """An adapter that its library has saved and loaded into the base model gives the same logits, to the last bit."""
    if subject.original.model is None:
        return skipped(subject, case, "reload", _TOO_LARGE)
    adapted = cast("Unreferenced", subject.adapted)
    again = adapted.reloaded(copy.deepcopy(subject.original.model)).eval()
    return judged(subject, case, "reload", exact({"logits": _run(case, again)}, {"logits": _run(case, subject.model)}))


@check(in_cell=[CellStage.WARM, CellStage.TRAINED], reference=Reference.ABSENT)
def check_merge_itself(subject: Subject, case: Case) -> CheckResult:
    """Merging does not change the outputs of the model, and after unmerging they depend on the adapter again.

    The allowed error is a multiple of a rounding error: the model's own in its dtype, or that of a copy whose weights
    are rounded once more. The merged model no longer depends on the adapter. The check works on a copy.
    """
    if not is_small(subject.model):
        return skipped(subject, case, "merge_itself", _TOO_LARGE)
    wide, near, mine = (copy.deepcopy(cast("Unreferenced", subject.adapted)) for _ in range(3))
    wide.model.double()
    _round_once_more(near, subject.dtype, case.generator(salt=4))
    draws = [_logits(case, cast("Unreferenced", subject.adapted)), _logits(case, near)]
    try:
        mine.merge()
        added = _added(mine)
        values = [tensor.detach().clone() for tensor in added]
        _scale(added, -3)
        merged = _logits(case, mine)
        with torch.no_grad():
            for tensor, value in zip(added, values, strict=True):
                tensor.copy_(value)
        mine.unmerge()
    except (NotImplementedError, ValueError, AttributeError) as error:
        why = str(error) or type(error).__name__
        return skipped(subject, case, "merge_itself", f"the library does not merge it: {why}")
    try:
        truth = _logits(case, wide)
    except RuntimeError as error:
        if shortage(error):
            raise
        return skipped(subject, case, "merge_itself", f"the model cannot run in float64 as a reference: {error}")
    verdict = noise_floor(merged, truth, draws, subject.dtype, case.factor("merge_itself"))
    if not verdict.passed:
        return judged(subject, case, "merge_itself", verdict, "after merging")
    for adapted in (wide, near, mine):
        _scale(adapted.tensors().values(), 0.75)
    verdict = noise_floor(
        _logits(case, mine), _logits(case, wide), [_logits(case, near)], subject.dtype, case.factor("merge_itself")
    )
    return judged(subject, case, "merge_itself", verdict, "" if verdict.passed else "after unmerging")


def _logits(case: Case, adapted: Unreferenced) -> dict[str, Tensor]:
    return {"logits": _run(case, adapted.model)}


@torch.no_grad()
def _scale(tensors: Iterable[Tensor], factor: float) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


@torch.no_grad()
def _round_once_more(adapted: Unreferenced, dtype: str, generator: torch.Generator) -> None:
    """Move every frozen weight of the adapted layers by up to half a unit in the last place of `dtype`.

    The rounding after a merge moves weights by such amounts.
    """
    trains = {id(t) for t in adapted.tensors().values()}
    for base in adapted.bases().values():
        for weight in base.parameters():
            if id(weight) not in trains:
                weight.copy_(perturbed(weight.double(), dtype, generator))


def _added(adapted: Unreferenced) -> list[Tensor]:
    """Return the trainable tensors that are not parameters of the base layers.

    After merging, some trainable tensors are parameters of the base layers. LayerNorm tuning is an example.
    """
    own = {id(p) for base in adapted.bases().values() for p in base.parameters()}
    return [t for t in adapted.tensors().values() if id(t) not in own]


def _run(case: Case, model: nn.Module) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = _forward(case, model).detach().clone()
    model.train(was_training)
    return logits


def _observed(subject: Subject, case: Case) -> dict[str, Tensor]:
    """Return the logits of the whole model in eval mode, and the gradient of each trainable tensor."""
    subject.model.eval()
    tensors = subject.adapted.tensors()
    logits = _forward(case, subject.model)
    dy = normal_noise(logits.shape, case.generator(salt=3)).to(logits)
    gradients = torch.autograd.grad(logits, list(tensors.values()), dy, allow_unused=True)
    seen = {f"grad {name}": g for name, g in zip(tensors, gradients, strict=True) if g is not None}
    return {"logits": logits.detach(), **seen}


def _forward(case: Case, model: nn.Module) -> Tensor:
    if case.forward is None:
        raise ValueError("these checks run the whole model, and the case has none")
    return case.forward(model)


def _base_output(case: Case) -> Tensor:
    if case.base_output is None:
        raise ValueError("this check compares with the base model, and the case has not run it")
    return case.base_output
