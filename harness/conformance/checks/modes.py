"""Check of the ways to call an implementation: modes of torch, shapes and layouts of the input, copies and repetition."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance import process_settings
from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.call_forms import (
    FORMS,
    FORMS_OF_IMAGES,
    FORMS_OF_ROWS,
    LONG_FORMS,
    REPEATS,
    ROWS,
    WITHOUT_GRADIENTS,
    Call,
    constant_input,
    copied,
    owns,
    tensors_of_copy,
)
from harness.conformance.comparison.check_results import judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import HALF, cast, inputs
from harness.conformance.comparison.layer_comparison import reference_runs
from harness.conformance.comparison.observations import observe, preserved_state
from harness.conformance.comparison.tolerance_policies import Judgement, exact, noise_floor, worst_of
from harness.conformance.operation import OperationSubject, cloned, mapped
from harness.conformance.subject import DTYPES, Subject, load
from harness.records.record import CheckResult

SMALL = 3_000
"""An Operation is called REPEATS times only if its arguments have fewer elements than this."""
TINY = 2.0**-13
"""Factor that makes a tensor tiny. The update still exceeds the rounding errors of float32."""
OTHER_DTYPE = {"float64": "float32", "float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""dtype of a layer -> dtype to which a copy of the layer is cast."""
LAYERS = 2
"""Number of layers to try. More layers would show little, because all layers of a model are of one class."""


@check(States.WARM, only_wide=True)
def check_calls(subject: Subject | OperationSubject, case: Case) -> CheckResult:
    """Every way to call an implementation gives what the reference gives for the same numbers.

    A layer: sequences of one token, four dimensions, transposed and sliced inputs, images with channels last; no_grad,
    inference_mode, autocast (also after a change of the tensors) and activation checkpointing; an input, the adapter,
    or all but one of its tensors without gradients; a deep copy, and one in another dtype; the gradient of a gradient;
    a graph that torch.compile traces; many calls, and calls in two threads. An Operation: no_grad, inference_mode,
    arguments that need a gradient, all or one of them; the gradient of a sum, of one output alone, and a second time
    through the same graph; other numbers, arguments that change between two calls, and many calls.
    """
    found = list(_of_operation(subject, case) if isinstance(subject, OperationSubject) else _of_layers(subject, case))
    if not found:
        return skipped(subject, case, "calls", "there is no layer to call")
    return judged(subject, case, "calls", worst_of(found, found[0].policy))


def _of_layers(subject: Subject, case: Case) -> Iterator[Judgement]:
    for index, path in enumerate(list(subject.adapted.layers)[:LAYERS]):
        base, layer = subject.original_base(path), subject.adapted.layers[path]
        generator = case.generator(index + 700)
        x, dy = inputs(base, ROWS, DTYPES[subject.dtype], generator, case.magnitude)
        call = Call(layer, subject.tensors_of(path), x, dy, subject.trains_plainly)
        truth, draws = reference_runs(subject, path, x, dy)
        # transformers' Conv1D itself takes no strided input.
        forms = (
            (FORMS_OF_ROWS if isinstance(base, nn.Linear) else {})
            | (FORMS_OF_IMAGES if isinstance(base, nn.Conv2d) else {})
            | FORMS
            | (LONG_FORMS if index == 0 and case.walks else {})
        )
        for name, form in forms.items():
            if form is copied and not owns(layer, call.tensors):
                continue
            missing = (
                truth.keys() - {"y"} if form in WITHOUT_GRADIENTS else {"grad x"} if form is constant_input else set()
            )
            wanted = {n: t for n, t in truth.items() if n not in missing}
            own = ({n: t for n, t in draw.items() if n in wanted} for draw in draws)
            yield _named(path, name, noise_floor(form(call), wanted, own, subject.dtype, case.factor("calls")))
        for name in call.tensors if len(call.tensors) > 1 else ():
            wanted = {n: t for n, t in truth.items() if n in ("y", "grad x", f"grad {name}")}
            own = ({n: t for n, t in draw.items() if n in wanted} for draw in draws)
            with _only_trained(call.tensors, name):
                mine = call.observe(call.x, call.dy)
            yield _named(
                path, f"with only {name} trained", noise_floor(mine, wanted, own, subject.dtype, case.factor("calls"))
            )
        if subject.dtype == "float32":
            yield from _under_autocast(subject, case, path, layer, x, dy)
            yield from _untrained(subject, case, path, call)
    yield from _in_other_precisions(subject, case)


def _under_autocast(
    subject: Subject, case: Case, path: str, layer: nn.Module, x: Tensor, dy: Tensor
) -> Iterator[Judgement]:
    """Yield two judgements of the output under autocast: before and after the trained tensors change."""
    wide, own = (subject.reference(path, dtype) for dtype in ("float64", "float32"))
    mine = subject.tensors_of(path)
    held = {name: t.detach().clone() for name, t in mine.items()}
    try:
        for when in ("under autocast", "under autocast after a change"):
            truth = observe(wide.layer, {}, cast(x, "float64"), dy.double()[:0])
            with torch.autocast(x.device.type, torch.bfloat16):
                # dy[:0] fits no output, so that no gradients are computed.
                seen, rounded = (observe(of, {}, x, dy[:0]) for of in (layer, own.layer))
            truth, seen, rounded = ({"y": one["y"]} for one in (truth, seen, rounded))
            yield _named(path, when, noise_floor(seen, truth, rounded, "bfloat16", case.factor("calls")))
            with torch.no_grad():
                for tensor in (*mine.values(), *wide.tensors.values(), *own.tensors.values()):
                    tensor.mul_(HALF)
    finally:
        load(subject.adapted, {f"{path}.{name}": value for name, value in held.items()})


def _untrained(subject: Subject, case: Case, path: str, call: Call) -> Iterator[Judgement]:
    """Yield judgements of the output without gradients while one tensor is tiny, as after the first steps of training."""
    for name, tensor in call.tensors.items():
        held = tensor.detach().clone()
        try:
            with torch.no_grad():
                tensor.mul_(TINY)
                seen = call.output(training=False)
            truth, draws = reference_runs(subject, path, call.x, call.dy[:0])
            verdict = noise_floor(seen, truth, draws, subject.dtype, case.factor("calls"))
            yield _named(path, f"with a tiny {name}", verdict)
        finally:
            load(subject.adapted, {f"{path}.{name}": held})


@contextmanager
def _only_trained(tensors: Mapping[str, Tensor], name: str) -> Iterator[None]:
    """Within this context, only the tensor `name` requires a gradient. LoRA-FA, for example, trains only one factor."""
    others = [tensor for key, tensor in tensors.items() if key != name]
    for tensor in others:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in others:
            tensor.requires_grad_(True)


def _in_other_precisions(subject: Subject, case: Case) -> Iterator[Judgement]:
    """Yield two judgements of the first adapted layer.

    The first judges the gradient of a gradient. The second judges a copy of the layer in another dtype.
    """
    path = next(iter(subject.adapted.layers), None)
    if path is None:
        return
    layer, tensors = subject.adapted.layers[path], subject.tensors_of(path)
    x, dy = inputs(subject.original_base(path), ROWS, DTYPES[subject.dtype], case.generator(720))
    own, factor = subject.reference(path, subject.dtype), case.factor("calls")
    if x.is_floating_point() and _second(own.layer, own.tensors, x, dy):
        truth, draws = reference_runs(subject, path, x, dy, look=_second)
        verdict = noise_floor(_second(layer, tensors, x, dy), truth, draws, subject.dtype, factor)
        yield _named(path, "the gradient of a gradient", verdict)
        own = subject.reference(path, subject.dtype)  # the draws may have moved its tensors
    rounded_alike = {t.dtype for t in tensors.values()} <= {
        DTYPES[subject.dtype]
    }  # False if an adapter stays in float32
    if path in subject.packed or not rounded_alike or not owns(layer, tensors):
        return
    other = OTHER_DTYPE[subject.dtype]
    x_other, dy_other = cast(x, other), dy.to(DTYPES[other])

    def moved(of: nn.Module, named: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
        """Run a copy of the layer in `dtype`, after rounding its values to `other`, and return the observation."""
        made = copy.deepcopy(of).to(DTYPES[other]).to(DTYPES[dtype])
        named = tensors_of_copy(of, made, named)
        return observe(made, named, cast(x_other, dtype), dy_other.to(DTYPES[dtype]), training=subject.trains_plainly)

    truth, rounded = (moved(own.layer, own.tensors, dtype) for dtype in ("float64", other))
    yield _named(
        path, f"by a copy in {other}", noise_floor(moved(layer, tensors, other), truth, rounded, other, factor)
    )


def _second(layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the gradients of sum(x * dL/dx) with respect to `tensors`, by name.

    dL/dx is the gradient of the input x for the incoming gradient dy. If dL/dx has no graph, return an empty dict.
    """
    leaf = x.detach().clone().requires_grad_(True)
    with preserved_state(layer, tensors, training=False):
        y = layer(leaf)
        if not y.requires_grad:
            return {}
        first = torch.autograd.grad(y, leaf, dy, create_graph=True)[0]
        if not first.requires_grad:
            return {}
        (first * x).sum().backward()
        return {f"grad {n}": t.grad.detach().clone() for n, t in tensors.items() if t.grad is not None}


def _named(path: str, form: str, judgement: Judgement) -> Judgement:
    return prefix_tensor(f"{path} {form}" if path else form, judgement)


def _of_operation(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    plain = {name: t.detach().clone() for name, t in subject.call().items()}

    def judge(form: str, mine: dict[str, Tensor]) -> Judgement:
        return operation_call.judge_form(form, subject, mine, plain, case)

    with torch.no_grad():
        yield judge("under no_grad", subject.call())
    with torch.inference_mode():
        yield judge("under inference_mode", subject.call())
    yield judge("with arguments that need a gradient", _detached(subject.call(**_leaves(subject.arguments))))
    yield _judge_changed(subject, case, "with other numbers", _with_other_numbers(subject.arguments))
    yield _judge_changed(subject, case, "after its arguments changed", subject.arguments, in_place=True)
    differentiable, factor = subject.operation.differentiable, case.factor("calls")
    # Of a list of adapters, the last alone: its neighbours are frozen.
    there = {name: name.partition("[")[0] for name in operation_call.flatten(subject.arguments)}
    items = {group: name for name, group in there.items() if name != group}
    alone = [name for name in differentiable if name in there.values()]
    alone += [name for group, name in items.items() if group in differentiable]
    for name in alone if len(alone) > 1 else ():
        verdict = operation_call.judge_gradients(subject, case, factor, of=[name])
        yield _named("", f"with only {name} needing a gradient", verdict)
    layouts: dict[operation_call.Layout, str] = {
        "expanded": "the gradient of a sum",
        "transposed": "a transposed gradient",
    }
    for layout, form in layouts.items() if differentiable else ():
        yield _named("", f"with {form}", operation_call.judge_gradients(subject, case, factor, layout=layout))
    for name in subject.operation.outputs if differentiable and len(subject.operation.outputs) > 1 else ():
        yield _named("", f"with only {name} in use", operation_call.judge_gradients(subject, case, factor, used=[name]))
    if differentiable:
        yield _named("", "in a second backward pass", operation_call.judge_gradients(subject, case, factor, times=2))
    with process_settings.restored():
        torch.set_default_dtype(torch.bfloat16)
        seen = subject.call()
    yield judge("while torch's default dtype is bfloat16", seen)
    times = REPEATS if _is_small(subject.arguments) else 2
    calls = (subject.call() for _ in range(times))
    different = (one for one in calls if not exact(operation_call.finite(one), operation_call.finite(plain)).passed)
    yield judge(f"{times} times", next(different, plain))


def _judge_changed(
    subject: OperationSubject, case: Case, form: str, arguments: Mapping[str, Any], *, in_place: bool = False
) -> Judgement:
    """Call the Operation twice with different numbers, and judge the second call.

    The first call gets the subject's own arguments, and the second call gets `arguments`. in_place: both calls get the
    same tensors, which change between the calls.
    """
    given = cloned(dict(arguments))
    with torch.no_grad():
        subject.function(**(given if in_place else cloned(subject.arguments)))
        if in_place:
            operation_call.map_tensors(given, _change)
        changed = replace(subject, arguments=cloned(given))
        mine = subject.operation.named(subject.function(**given))
    return _named("", form, worst_of([one for one, _ in operation_call.judgements(changed, mine, case)], "as outputs"))


def _change(tensor: Tensor) -> Tensor:
    """Change a tensor in place: halve numbers, and move codes or indices by one place."""
    return tensor.mul_(HALF) if tensor.is_floating_point() else tensor.copy_(tensor.roll(1, 0))


def _with_other_numbers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return mapped(dict(arguments), lambda one: one * HALF if type(one) is float else one)


def _detached(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in named.items()}


def _leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return operation_call.map_floats(cloned(dict(arguments)), lambda t: t.requires_grad_(True))


def _is_small(arguments: Mapping[str, Any]) -> bool:
    return sum(t.numel() for t in operation_call.flatten(dict(arguments)).values()) < SMALL
