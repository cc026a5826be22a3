"""Checks of the computation: layers, gradients, one optimizer step and the whole model against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import CellStage, States, check
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.check_results import judged, prefix_tensor, skipped
from harness.conformance.comparison.distances import Distance
from harness.conformance.comparison.inputs import cast, inputs, takes_rows
from harness.conformance.comparison.layer_comparison import observe_with_reference
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.optimizer_steps import optimizer_of
from harness.conformance.comparison.tolerance_policies import Judgement, carried_noise, exact, noise_floor, worst_of
from harness.conformance.subject import DTYPES, LARGEST_COPY, Subject
from harness.conformance.tolerance_constants import CEILING, LARGEST_OVERFLOW, PERTURBED_DRAWS
from harness.methods.spec import Adapted
from harness.records.record import CheckResult
from reference.shared.layers import Convolution


@check(States.INIT, in_cell=[CellStage.START])
def check_identity(subject: Subject, case: Case) -> CheckResult:
    """At its start the adapted model computes what the base model computes.

    The outputs are equal to the last bit if the update is exactly zero (LoRA: B = 0) and the product with the base
    weight is computed as before. Otherwise the error, compared with the base model in float64, may be a multiple of the
    rounding error of the base model, or of the reference's start, in this dtype. For example, a kernel may sum in another
    order, and PiSSA's start equals the base only in exact arithmetic (residual + s B A = W).
    """
    if case.run_model is None or case.base_output is None:
        return skipped(subject, case, "identity", "no whole-model input in this case")
    mine, base = {"logits": case.run_model()}, {"logits": case.base_output}
    if (same := exact(mine, base)).passed:
        return judged(subject, case, "identity", same, "to the last bit")
    if subject.original.model is None or case.forward is None:
        return skipped(
            subject, case, "identity", "not to the last bit, and the model was too large to be copied to float64"
        )
    with torch.no_grad():
        truth = {"logits": case.forward(whole_model.base(subject, "float64"))}
        factor = case.factor("identity")
        # In this dtype, a start may be as inexact as the base, as the reference's own start, or as the base with slightly
        # moved weights. These starts are computed only on demand, because they may need an SVD of every weight. If the
        # reference's start overflows, another start may too, in up to half of the logits or four times the share.
        # If it is far from the base, as LoRA's orthogonal start is with tiny weights, its rounding hides the base.
        verdict = noise_floor(mine, truth, base, subject.dtype, factor)
        if not verdict.passed:
            starts = _starts(subject, case.forward)
            start = next(starts)
            share = [float((~one["logits"].isfinite()).double().mean()) for one in (mine, start)]
            may_overflow = min(share) > 0 and share[0] < max(LARGEST_OVERFLOW, 4 * share[1])
            hides_base = CEILING < Distance.of(start["logits"], truth["logits"]).norm < math.inf
            draws = chain([start] if may_overflow or hides_base else [base, start], starts)
            verdict = noise_floor(mine, truth, draws, subject.dtype, factor)
    return judged(subject, case, "identity", verdict)


def _starts(subject: Subject, forward: Callable[[nn.Module], Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the logits of the reference's start. In a small model, yield further ones.

    For these, the reference draws other random numbers, or each weight of the base is moved as rounding may move it.
    """
    further = PERTURBED_DRAWS if subject.reference_cache is not None else 0
    for seed in range(1 + further):
        yield _logits(forward, whole_model.start(subject, subject.dtype, seed))
    for seed in range(further):
        model = whole_model.base(subject, subject.dtype)
        whole_model.move_numbers(model, subject.dtype, torch.Generator().manual_seed(seed))
        yield _logits(forward, model)


@torch.no_grad()
def _logits(forward: Callable[[nn.Module], Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {"logits": forward(model)}


@check(in_cell=[CellStage.WARM], in_brief_cases=True)
def check_forward(subject: Subject, case: Case) -> CheckResult:
    """For a random input, the output of every adapted layer equals the reference's output.

    Errors must be within the noise floor: a multiple of the reference's rounding error in this dtype.
    """
    return judged(subject, case, "forward", case.once(_judge_layers, subject).outputs)


@check(in_cell=[CellStage.WARM], in_brief_cases=True)
def check_gradient(subject: Subject, case: Case) -> CheckResult:
    """The gradients of every adapted layer equal the reference's.

    These are the gradients of the layer's input and of each of its trainable tensors. Errors must be within the noise
    floor: a multiple of the reference's rounding error in this dtype.
    """
    return judged(subject, case, "gradient", case.once(_judge_layers, subject).gradients)


@check(States.WARM, depends_on_sizes=False)
def check_strides(subject: Subject, case: Case) -> CheckResult:
    """Outputs and gradients equal the reference's for other memory layouts, and for an input without tokens.

    The input is a transposed view. The incoming gradient is one expanded row, as `y.sum(0)` sends it backward, or one
    expanded number, as `y.sum()` sends it.
    """
    found = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        if not takes_rows(base):
            continue
        x, dy = inputs(base, case.tokens, DTYPES[subject.dtype], case.generator(index), case.magnitude)
        x, row, number = x.T.contiguous().T, dy[:1].expand(dy.shape), dy[:1, :1].expand(dy.shape)
        for rows, expanded in ((slice(None), row), (slice(None), number), (slice(0, 0), row)):
            runs = observe_with_reference(subject, path, layer, x[rows], expanded[rows])
            found.append(prefix_tensor(path, noise_floor(*runs, subject.dtype, case.factor("strides"))))
    if not found:
        return skipped(subject, case, "strides", "the layers do not map rows to rows")
    return judged(subject, case, "strides", worst_of(found, found[0].policy))


@check(States.WARM, depends_on_sizes=False)
def check_vector(subject: Subject, case: Case) -> CheckResult:
    """For inputs with fewer or more dimensions than usual, the output and the gradients equal the reference's.

    These are a single vector (D,), two sequences (2, T, D), and for a convolution a single image such as (C, H, W).
    """
    found = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        if takes_rows(base) or isinstance(base, Convolution):
            x, dy = inputs(base, 1, DTYPES[subject.dtype], case.generator(index))
            runs = observe_with_reference(subject, path, layer, x[0], dy[0])
            found.append(prefix_tensor(path, noise_floor(*runs, subject.dtype, case.factor("vector"))))
        if takes_rows(base):
            x, dy = inputs(base, 2 * case.tokens, DTYPES[subject.dtype], case.generator(100 + index))
            two = (t.unflatten(0, (2, case.tokens)) for t in (x, dy))
            runs = observe_with_reference(subject, path, layer, *two)
            verdict = noise_floor(*runs, subject.dtype, case.factor("vector"))
            found.append(prefix_tensor(f"{path} with two sequences", verdict))
    if not found:
        return skipped(subject, case, "vector", "the layers map neither rows nor images")
    return judged(subject, case, "vector", worst_of(found, found[0].policy))


@check(States.WARM, in_brief_cases=True)
def check_step(subject: Subject, case: Case) -> CheckResult:
    """One optimizer step from the same state moves every trainable tensor as the reference moves it.

    The optimizer is the Method's own, or AdamW with weight decay.
    """
    found = []
    for index, path in enumerate(subject.adapted.layers):
        x, dy = inputs(subject.original_base(path), case.tokens, DTYPES[subject.dtype], case.generator(index))
        mine = _moved(subject.adapted.layers[path], subject.tensors_of(path), subject.adapted, x, dy, subject.dtype)
        truth = _moved_reference(subject, path, "float64", x, dy)
        if truth:
            draws = _moved_draws(subject, path, x, dy)
            found.append(prefix_tensor(path, noise_floor(mine, truth, draws, subject.dtype, case.factor("step"))))
    if not found:
        return skipped(subject, case, "step", "nothing trains")
    return judged(subject, case, "step", worst_of(found, found[0].policy))


def _moved(
    layer: nn.Module, tensors: Mapping[str, Tensor], adapted: Adapted, x: Tensor, dy: Tensor, dtype: str
) -> dict[str, Tensor]:
    """Take one optimizer step on `tensors`, restore their old values, and return the new values.

    dtype: dtype of the subject, also for the float64 reference, because the learning rate depends on it.
    """
    before = {n: t.detach().clone() for n, t in tensors.items()}
    gradients = observe(layer, tensors, x, dy)
    for name, tensor in tensors.items():
        tensor.grad = gradients.get(f"grad {name}")
    if before:
        optimizer_of(adapted, tensors.values(), dtype).step()
    moved = {n: t.detach().clone() for n, t in tensors.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(before[name])
            tensor.grad = None
    return moved


def _moved_reference(subject: Subject, path: str, dtype: str, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    twin = subject.reference(path, dtype)
    return _moved(twin.layer, twin.tensors, twin.adapted, cast(x, dtype), dy.to(DTYPES[dtype]), subject.dtype)


def _moved_draws(subject: Subject, path: str, x: Tensor, dy: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield plausible values of the tensors after one optimizer step: values that a correct program may compute.

    The reference in the subject's dtype gives the first values. For all further values, the inputs are moved by up to
    half a unit in the last place, and the reference computes in float64. These values show how much the step amplifies
    rounding errors, as GaLore's SVD does, even for a float64 subject.
    """
    yield _moved_reference(subject, path, subject.dtype, x, dy)
    for seed in range(PERTURBED_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        moved = (perturbed(t, subject.dtype, generator) for t in (cast(x, "float64"), dy.double()))
        yield _moved_reference(subject, path, "float64", *moved)


@check(in_cell=[CellStage.WARM])
def check_model(subject: Subject, case: Case) -> CheckResult:
    """The logits and the gradients of the whole model equal the reference's.

    If the model's input has floating-point numbers, the model runs twice. The first input needs no gradient, as in
    training. The second input needs one, and this gradient is compared, too. The reference is a float64 copy of the
    original model with the reference's layers in place of the adapted layers.
    """
    if case.forward is None:
        return skipped(subject, case, "model", "no whole-model input in this case")
    if subject.dtype == "float64":
        return skipped(subject, case, "model", "some models round to float32 inside, whatever their dtype")
    if subject.original.model is None:
        return skipped(subject, case, "model", f"a float64 copy is made up to {LARGEST_COPY:,} parameters")
    tensors = subject.adapted.tensors()
    mine = whole_model.observe(subject.model, tensors, subject, case.forward)
    truth = whole_model.observe(*whole_model.reference(subject, "float64"), subject, case.forward, with_input=True)
    if whole_model.INPUT_GRADIENT in truth:
        seen = whole_model.observe(subject.model, tensors, subject, case.forward, with_input=True)
        mine |= {name: tensor for name, tensor in seen.items() if name == whole_model.INPUT_GRADIENT}
    factor = case.factor("model")
    return judged(subject, case, "model", carried_noise(mine, truth, _carried(subject, case), subject.dtype, factor))


def _carried(subject: Subject, case: Case) -> Iterator[Mapping[str, Tensor]]:
    """Yield plausible logits and gradients of the whole model: results that a correct program may compute.

    The reference in the subject's dtype gives the first result. For each further result, every weight is moved at
    random, at most to a neighbouring number of the dtype. This imitates the rounding of intermediate results, where a
    model loses most accuracy. One result is not enough, because its errors may happen to cancel.
    """
    forward = case.forward
    if forward is None:
        return
    own = whole_model.reference(subject, subject.dtype)
    yield whole_model.observe(*own, subject, forward, with_input=True)
    for seed in range(PERTURBED_DRAWS):
        model, tensors = whole_model.reference(subject, subject.dtype)
        whole_model.move_numbers(model, subject.dtype, torch.Generator().manual_seed(seed))
        yield whole_model.observe(model, tensors, subject, forward, with_input=True)


def _only(run: dict[str, Tensor], output: bool) -> dict[str, Tensor]:
    """Return only the output of a run if `output` is true, otherwise only its gradients."""
    return {name: t for name, t in run.items() if (name == "y") == output}


@dataclass(frozen=True)
class _LayerJudgements:
    """The worst judgement of an output and the worst judgement of a gradient, over all adapted layers."""

    outputs: Judgement
    gradients: Judgement


def _judge_layers(subject: Subject, case: Case) -> _LayerJudgements:
    """Judge the output and the gradients of every adapted layer, and return the worst judgements.

    Each layer is run forward and backward together, as in training.
    """
    outputs: list[Judgement] = []
    gradients: list[Judgement] = []
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base = subject.original_base(path)
        x, dy = inputs(base, case.tokens, DTYPES[subject.dtype], case.generator(index), case.magnitude)
        if takes_rows(base) and len(x) % 2 == 0:
            x, dy = (t.view(2, -1, t.shape[-1]) for t in (x, dy))  # a batch of sequences, as models send it
        mine, truth, draws = observe_with_reference(subject, path, layer, x, dy, training=subject.trains_plainly)
        for found, name, is_output in ((outputs, "forward", True), (gradients, "gradient", False)):
            have, expected = _only(mine, is_output), _only(truth, is_output)
            if have or expected:
                own = (_only(draw, is_output) for draw in draws)
                found.append(prefix_tensor(path, noise_floor(have, expected, own, subject.dtype, case.factor(name))))
        dtype = next(iter(draws))["y"].dtype
        if mine["y"].dtype != dtype:
            wrong = f"{mine['y'].dtype}, should be {dtype}"
            outputs.append(Judgement(False, None, None, f"{path}: y", wrong, outputs[-1].policy, 0))
    return _LayerJudgements(*(worst_of(f, f[0].policy if f else "noise-floor") for f in (outputs, gradients)))
