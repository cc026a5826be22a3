"""Checks of AdaLoRA: its importance averages, its pruning schedule, and the term that it adds to the loss."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.call_forms import owns
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.layer_comparison import observe_with_reference
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import ROUNDED_SUMS, Judgement, exact, noise_floor, worst_of
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import DTYPES, Subject, load
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from harness.methods.spec import Adapted
from harness.records.record import CheckResult

# A complete schedule in 24 steps, with every kind of step. tfinal is no multiple of delta_t.
_SHORT = {"total_steps": 24, "tinit": 4, "tfinal": 5, "delta_t": 3}
# A schedule of thousands of steps without a warm-up, of which three are taken: the first pruning, one amid, and the last.
_LONG = {"total_steps": 6000, "tinit": 0, "tfinal": 100, "delta_t": 10}
_LONG_STEPS = (10, 1500, 5900)
_FIRST_PRUNING = 6
"""The first step of the schedule `_SHORT` that prunes."""
_CLIPPED = 3
"""Step of `check_importance` whose gradients replace those of a backward pass, as clipping does."""
_COPIED = 16
"""Step before which `check_budget` continues with a deep copy of the model and the adapter."""
_RESUMED = (13, 21)
"""Steps before which `check_budget` moves to a fresh model: one amid the prunings, and one after the last pruning."""
_LOADED = 20
"""Step before which `check_budget` loads other pruning masks into the model. The last pruning is over by then."""
_SMALL = 2.0**-18
"""Size of gradients that float16 holds only as subnormal numbers. It loses most of their products with weights."""
_LARGEST = 20_000
"""`check_budget`, which takes 26 steps, skips adapters with more elements."""


@check(States.WARM, in_brief_cases=True)
def check_importance(subject: Subject, case: Case) -> CheckResult:
    """After each step AdaLoRA's averages of sensitivity and uncertainty equal the reference's, for every weight.

    I = |w dL/dw|; I_bar <- beta1 I_bar + (1 - beta1) I; U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar|  (eqs. 8 to 10).
    The check takes three steps with random gradients, all before the first pruning. It does so twice: with beta1 and
    beta2 that differ, and with the betas of the config and gradients so small that float16 would lose most of I. The
    averages must therefore be stored in float32 or float64. The gradients that count are those in `grad` when
    `after_step` is called, after micro-batches and clipping.
    """
    found = []
    for size, betas in ((1.0, {"beta1": 0.85, "beta2": 0.7}), (_SMALL, {})):
        fresh = case.attach_again(**betas, **_SHORT)
        if fresh is None:
            return skipped(subject, case, "importance", "the case cannot attach again")
        load(fresh.adapted, subject.adapted.tensors())
        if not any(".exp_avg_ipt_" in name for name in fresh.state()):
            return skipped(subject, case, "importance", "the implementation does not show its averages in state()")
        truth, rounded = (_reference(fresh, dtype) for dtype in ("float64", subject.dtype))
        for step in (1, 2, 3):
            for adapted in (fresh.adapted, truth, rounded):
                if adapted is fresh.adapted and step == _CLIPPED:
                    torch.stack([t.sum() for t in adapted.tensors().values()]).sum().backward()
                _set_gradients(adapted, case.generator(salt=10 + step), DTYPES[subject.dtype], size)
                adapted.after_step(step)
            verdict = _judge_averages(subject, case, "importance", fresh.adapted, truth, rounded)
            found.append(prefix_tensor(f"step {step}{'' if size == 1 else ' with small gradients'}", verdict))
    return judged(subject, case, "importance", worst_of(found, found[0].policy))


@check(States.WARM, depends_on_sizes=False)
def check_unused(subject: Subject, case: Case) -> CheckResult:
    """If a layer gets no gradient in a step, AdaLoRA's averages change as they do for a gradient of zero.

    The importance of such a layer therefore declines, for example that of an expert that no token reaches. The averages
    of all other layers follow their gradients.
    """
    fresh = case.attach_again(**_SHORT)
    if fresh is None or not any(".exp_avg_ipt_" in name for name in fresh.state()):
        return skipped(subject, case, "unused", "the implementation does not show its averages in state()")
    load(fresh.adapted, subject.adapted.tensors())
    worlds = fresh.adapted, *(_reference(fresh, dtype) for dtype in ("float64", subject.dtype))
    for step in (1, 2):
        for adapted in worlds:
            _set_gradients(adapted, case.generator(salt=20 + step))
            for name, tensor in adapted.tensors().items() if step == 2 else ():
                if name.startswith(f"{next(iter(fresh.adapted.layers))}."):
                    tensor.grad = None if adapted is fresh.adapted else torch.zeros_like(tensor)
            adapted.after_step(step)
    return judged(subject, case, "unused", _judge_averages(subject, case, "unused", *worlds))


@check(States.WARM, in_brief_cases=True)
def check_budget(subject: Subject, case: Case) -> CheckResult:
    """Over a short schedule AdaLoRA leaves as many lambdas (singular values) unpruned as its budget b(t) allows.

    b(t) = target + (start - target) (1 - (t - t_i) / (T - t_f - t_i))^3, rounded down  (eq. 12). t_i, t_f and T are
    tinit, tfinal and total_steps. At the end, target_rank lambdas per layer are left on average, also if training takes
    two steps more than total_steps. Between two prunings a pruned lambda may become nonzero again, and the check sets
    all lambdas to nonzero values before each step. In float32 and float64 the unpruned lambdas are the same as in the
    reference, by the scores of eq. 7. In half precision lambdas with close scores may change places, up to a quarter of
    all. Two more schedules follow these rules. One has 6000 steps and tinit = 0, so it prunes from the start; three of its
    steps are tried, with gradients so small that scores in float16 would be 0. The other is drawn, such as one with
    tfinal = 0, or one in which no step before the last pruning is a multiple of delta_t.

    Twice, the check continues with a fresh model that gets `tensors()` and `state()`, as after an interruption. If
    `state()` contains the pruning masks, the check writes other masks there once, which must take effect. Once, it continues
    with a deep copy of model and adapter, which must not act on the original.
    """
    if sum(t.numel() for t in subject.added().values()) > _LARGEST:
        return skipped(subject, case, "budget", "the schedule does not depend on the size of an adapter")
    fresh = case.attach_again(**_SHORT)
    if fresh is None:
        return skipped(subject, case, "budget", "the case cannot attach again")
    truth = _reference(fresh, "float64")
    problems: list[str] = []
    for step in range(1, _SHORT["total_steps"] + 3):
        if step in _RESUMED and any(".exp_avg_ipt_" in name for name in fresh.state()):
            before, fresh = fresh, case.attach_again(**_SHORT) or fresh
            load(fresh.adapted, before.adapted.tensors(), before.state())
        if step == _COPIED and owns(fresh.model, fresh.adapted.tensors()):
            with suppress(TypeError):  # an `Adapted` may hold what cannot be copied, such as a lock
                model, adapted = copy.deepcopy((fresh.model, fresh.adapted))
                fresh = replace(fresh, model=model, adapted=adapted)
        if step == _LOADED:
            masks = {name: mask.roll(1, 0) for name, mask in truth.state().items() if name.endswith(".mask")}
            shown = masks.keys() & fresh.state().keys()  # an implementation may keep its masks out of state()
            for adapted in (fresh.adapted, truth):
                load(adapted, {}, {name: masks[name] for name in shown})
        problems += _problems_after(step, fresh, truth, case)
    mine = _unmasked(fresh.adapted)
    if (long := case.attach_again(**_LONG)) is not None:
        truth = _reference(long, "float64")
        for step in _LONG_STEPS:
            problems += [f"of 6000, {one}" for one in _problems_after(step, long, truth, case, _SMALL)]
    drawn = _drawn_schedule(case.seed + sum(t.numel() for t in subject.added().values()))
    if (other := case.attach_again(**drawn)) is not None:
        truth, how = _reference(other, "float64"), ", ".join(f"{name} = {value}" for name, value in drawn.items())
        for step in range(1, drawn["total_steps"] + 1):
            problems += [f"with {how}: {one}" for one in _problems_after(step, other, truth, case)]
    return from_problems(subject, case, "budget", problems, f"{int(mine.sum())} of {len(mine)} lambdas left at the end")


def _drawn_schedule(seed: int) -> dict[str, int]:
    """Draw the settings of a schedule of 4 to 10 steps. Adapters of other sizes get other schedules."""
    draw = random.Random(seed).randint  # noqa: S311  # no secret
    steps = draw(4, 10)
    tinit = draw(0, steps // 2)
    tfinal = draw(0, 1) * draw(0, steps - 2 - tinit)
    return {"total_steps": steps, "tinit": tinit, "tfinal": tfinal, "delta_t": draw(1, steps - tinit - tfinal)}


def _problems_after(step: int, fresh: Subject, truth: Adapted, case: Case, size: float = 1.0) -> Iterator[str]:
    """Let `fresh` and the reference `truth` take a step with the same tensors and gradients, and compare their lambdas.

    size: standard deviation of the gradients.
    """
    held = dict(fresh.adapted.tensors())
    for adapted in (fresh.adapted, truth):
        _set_tensors(adapted, DTYPES[fresh.dtype], case.generator(salt=100 + step))
        _set_gradients(adapted, case.generator(salt=200 + step), DTYPES[fresh.dtype], size)
        adapted.after_step(step)
    if any(held.get(name) is not tensor for name, tensor in fresh.adapted.tensors().items()):
        yield f"after step {step} tensors() has other tensors, which no optimizer knows"
    mine, want = (_unmasked(adapted) for adapted in (fresh.adapted, truth))
    if int(mine.sum()) != int(want.sum()):
        yield f"after step {step} {int(mine.sum())} of {len(mine)} lambdas are left, should be {int(want.sum())}"
    elif (other := int((mine != want).sum())) > (0 if fresh.dtype in ROUNDED_SUMS else max(2, len(mine) // 4)):
        yield f"after step {step} {other} lambdas are left or pruned against the scores"


@check(States.WARM, depends_on_sizes=False, in_minor_examples=True)
def check_pruned(subject: Subject, case: Case) -> CheckResult:
    """While some lambdas (singular values) are pruned, outputs and gradients still equal the reference's.

    A pruned lambda gets a gradient, so it may grow again until the next pruning. The scaling does not depend on the
    number of lambdas that are left.
    """
    fresh = case.attach_again(**_SHORT)
    if fresh is None:
        return skipped(subject, case, "pruned", "the case cannot attach again")
    load(fresh.adapted, subject.adapted.tensors())
    for step in range(1, _FIRST_PRUNING + 1):
        _set_gradients(fresh.adapted, case.generator(salt=300 + step), DTYPES[subject.dtype])
        fresh.adapted.after_step(step)
    if bool(_unmasked(fresh.adapted).all()):
        return skipped(subject, case, "pruned", "the budget is still the whole rank")
    found = []
    for index, (path, layer) in enumerate(fresh.adapted.layers.items()):
        x, dy = inputs(fresh.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        runs = observe_with_reference(fresh, path, layer, x, dy, training=fresh.trains_plainly)
        found.append(prefix_tensor(path, noise_floor(*runs, subject.dtype, case.factor("gradient"))))
    return judged(subject, case, "pruned", worst_of(found, found[0].policy))


@check(in_brief_cases=True)
def check_regularizer(subject: Subject, case: Case) -> CheckResult:
    """The term that AdaLoRA adds to the loss equals the reference's, with its gradients.

    The term is gamma R(P, Q). As the config states, R is the mean of the norms ||P^T P - I|| and ||Q Q^T - I|| of all
    layers, or the sum of their squares (eq. 4). It is the same in training and in eval mode. If gamma is 0, there
    is no term, or all its numbers are 0. A deep copy of the adapter has the term of its own tensors.
    """
    mine, truth = (_regularizer(adapted) for adapted in (subject.adapted, _reference(subject, "float64")))
    was_training = subject.model.training
    subject.model.train(not was_training)
    other = _regularizer(subject.adapted)
    subject.model.train(was_training)
    if (mine or other) and not (verdict := exact(other, mine)).passed:
        return judged(subject, case, "regularizer", verdict, "in the other mode")
    if not truth and not mine:
        return skipped(subject, case, "regularizer", "gamma is 0")
    if not truth:
        zeros = {name: torch.zeros_like(t) for name, t in mine.items()}
        return judged(subject, case, "regularizer", exact(mine, zeros))
    verdict = noise_floor(mine, truth, _regularizers_in_dtype(subject), subject.dtype, case.factor("regularizer"))
    if verdict.passed and not (of_copy := exact(_regularizer(copy.deepcopy(subject.adapted)), mine)).passed:
        return judged(subject, case, "regularizer", of_copy, "of a deep copy")
    return judged(subject, case, "regularizer", verdict)


def _regularizers_in_dtype(subject: Subject) -> Iterator[dict[str, Tensor]]:
    """Yield plausible values of the regularizer and its gradients: values that a correct program may compute.

    The reference in the subject's dtype gives the first values. The regularizer is a single number, so these may happen
    to be exact. For all further values, each tensor is moved by up to half a unit in the last place, the reference
    computes in float64, and each number that it returns is moved in the same way.
    """
    yield _regularizer(_reference(subject, subject.dtype))
    for seed in range(PERTURBED_DRAWS):
        moved, generator = _reference(subject, "float64"), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in moved.tensors().values():
                tensor.copy_(perturbed(tensor, subject.dtype, generator))
        yield {name: perturbed(t, subject.dtype, generator) for name, t in _regularizer(moved).items()}


def _reference(subject: Subject, dtype: str) -> Adapted:
    """Attach the reference to all layers of a model, and return it.

    The layers share one budget, so the reference needs all of them. Its tensors and state get the subject's present
    values.
    """
    adapted = subject.fresh_reference(dtype)
    places: dict[str, Any] = {**adapted.tensors(), **adapted.state()}
    with torch.no_grad():
        for name, value in {**subject.adapted.tensors(), **subject.state()}.items():
            if name in places:
                places[name].copy_(value)
    return adapted


def _averages(adapted: Adapted) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in adapted.state().items() if ".exp_avg_" in name}


def _judge_averages(
    subject: Subject, case: Case, name: str, mine: Adapted, truth: Adapted, rounded: Adapted
) -> Judgement:
    """Judge the averages of the subject's adapter `mine` by the averages of the reference.

    truth: the reference in float64. rounded: the reference in the subject's dtype. name: name of the check.
    """
    averages = _averages(mine), _averages(truth), _averages(rounded)
    return noise_floor(*averages, subject.dtype, case.factor(name))


def _set_gradients(
    adapted: Adapted, generator: torch.Generator, rounded: torch.dtype | None = None, size: float = 1.0
) -> None:
    """Give every tensor a random gradient, which is the same in every dtype up to rounding.

    rounded: dtype to which the gradients are rounded first. size: standard deviation of the gradients.
    """
    for _, tensor in sorted(adapted.tensors().items()):
        drawn = size * normal_noise(tensor.shape, generator)
        tensor.grad = drawn.to(rounded or torch.float64).to(tensor.device, tensor.dtype)


@torch.no_grad()
def _set_tensors(adapted: Adapted, rounded: torch.dtype, generator: torch.Generator) -> None:
    """Fill every tensor with random values, none of them zero. An optimizer step usually leaves no zeros either."""
    for _, tensor in sorted(adapted.tensors().items()):
        drawn = normal_noise(tensor.shape, generator).to(rounded)
        tensor.copy_(torch.where(drawn == 0, torch.ones_like(drawn), drawn))


def _unmasked(adapted: Adapted) -> Tensor:
    """Return a bool vector over the lambdas (singular values) of all layers. It is True where a lambda is not zero."""
    named = sorted(adapted.tensors().items())
    return torch.cat([tensor.detach().flatten() != 0 for name, tensor in named if name.endswith(".E")])


def _regularizer(adapted: Adapted) -> dict[str, Tensor]:
    """Return the term that AdaLoRA adds to the loss as `term`, and its gradients as `grad <name>`.

    If there is no such term, return an empty dict.
    """
    term = adapted.regularizer()
    if term is None:
        return {}
    tensors = {name: t for name, t in adapted.tensors().items() if not name.endswith(".E")}
    gradients = torch.autograd.grad(term, list(tensors.values()), allow_unused=True)
    seen = {f"grad {name}": g for name, g in zip(tensors, gradients, strict=True) if g is not None}
    return {"term": term.detach(), **seen}
