"""Ways (forms) to call an Operation: modes of torch, gradients of some arguments, changed numbers and repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from harness.conformance import process_settings
from harness.conformance.case import Case
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.argument_values import with_shared_tensors, with_zeros
from harness.conformance.comparison.call_forms import LONG_RUN, REPEATS, THREADS
from harness.conformance.comparison.check_results import prefix_tensor
from harness.conformance.comparison.inputs import HALF, is_large, safe_factor
from harness.conformance.comparison.kept_memory import StorageWatch, describe_leak, describe_views
from harness.conformance.comparison.operation_autocast import under_autocast
from harness.conformance.comparison.threads import at_once
from harness.conformance.comparison.tolerance_policies import Judgement, exact, noise_floor, worst_of
from harness.conformance.normal_noise import normal_noise
from harness.conformance.operation import OperationSubject, cloned, mapped
from harness.conformance.subject import DTYPES

_SPARE = 4096
"""Number of elements that outputs may keep in memory beyond twice their own. A program may fill up the last block, and the
longest block of a suite has 4096 elements."""
_Named = dict[str, Tensor]


class OperationForm(StrEnum):
    """Names of the ways to call an Operation. `{}` stands for an argument, an output, a dtype or a number."""

    NO_GRAD = "under no_grad"
    INFERENCE = "under inference_mode"
    DEFAULT_BFLOAT16 = "while torch's default dtype is bfloat16"
    DEFAULT_FLOAT64 = "while torch's default dtype is float64"
    DETERMINISTIC = "with deterministic algorithms"
    NO_AUTOCAST = "with autocast switched off again"
    AUTOCAST = "under autocast to {}"
    LEAVES = "with arguments that need a gradient"
    DISTANT = "on stacked weights far apart in memory"
    OTHER_NUMBERS = "with other numbers"
    CHANGED = "after its arguments changed"
    ONE_CHANGED = "after {} changed"
    ZERO_ARGUMENT = "with zeros as {}"
    SHARED = "with a tensor that is several items of {}"
    OUTPUTS_OVERWRITTEN = "after its outputs were overwritten"
    EARLIER_OVERWRITTEN = "after earlier outputs were overwritten"
    ONE_GRADIENT = "with only {} needing a gradient"
    EXPANDED = "with the gradient of a sum"
    TRANSPOSED = "with a transposed gradient"
    COLUMNS = "with a gradient that is a part of each row"
    ONE_OUTPUT = "with only {} in use"
    SECOND_BACKWARD = "in a second backward pass"
    ZEROS = "with gradients that are zeros"
    NO_LEAVES = "from arguments that are no leaves"
    CHANGED_BEFORE_BACKWARD = "with {} changed before backward"
    OUTPUTS_IN_PLACE = "with outputs that are changed in place"
    LATER_GRADIENTS = "before other gradients"
    SECOND_ORDER = "the gradient of a gradient"
    NO_GRAPH = "with a graph that nothing needs"
    VIEWS = "outputs that are views of larger tensors"
    DROPPED = "still in memory after the program dropped it"
    THREADS = f"in {THREADS} threads"
    REPEATED = "{} times"
    REPEATED_BACKWARD = f"backward {REPEATS} times"


def of_operation(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    """Call the Operation in every form, and yield judgements of the outputs and gradients."""
    plain = {name: t.detach().clone() for name, t in subject.call().items()}

    def judge(form: str, mine: _Named) -> Judgement:
        return operation_call.judge_form(form, subject, mine, plain, case)

    for form, seen in _in_modes(subject):
        yield judge(form, seen)
    yield from (
        prefix_tensor(OperationForm.AUTOCAST.format(dtype), one) for dtype, one in under_autocast(subject, plain, case)
    )
    outputs = subject.call(**_leaves(subject.arguments))
    yield judge(OperationForm.LEAVES, _detached(outputs))
    if not subject.operation.differentiable:
        if recorded := _recorded(subject, outputs):
            yield Judgement(False, None, None, recorded[0], OperationForm.NO_GRAPH, "exact", 0)
        if views := _views(subject):
            yield Judgement(False, None, None, "", f"{OperationForm.VIEWS}: {views}", "exact", 0)
    others = mapped(dict(subject.arguments), lambda one: one * HALF if type(one) is float else one)
    yield _judge_changed(subject, case, OperationForm.OTHER_NUMBERS, others)
    yield _judge_changed(subject, case, OperationForm.CHANGED, subject.arguments, in_place=list(subject.arguments))
    for name in subject.arguments:
        if operation_call.flatten(subject.arguments[name]):
            form = OperationForm.ONE_CHANGED.format(name)
            yield _judge_changed(subject, case, form, subject.arguments, in_place=[name])
    for form, several in ((OperationForm.ZERO_ARGUMENT, with_zeros), (OperationForm.SHARED, with_shared_tensors)):
        yield from (prefix_tensor(form.format(name), one) for name, one in several(subject, case))
    yield from _after_overwriting(subject, judge)
    if subject.operation.differentiable:
        yield from _gradients(subject, case)
    if kept := describe_leak(subject.call):
        yield Judgement(False, None, None, "", f"memory grows with every call: {kept}", "exact", 0)
    if subject.operation.differentiable and (held := _alive_after_calls(subject, case)):
        yield Judgement(False, None, None, ", ".join(held), OperationForm.DROPPED, "exact", 0)
    yield judge(OperationForm.THREADS, _in_threads(subject, _detached(subject.call())))
    if not case.is_brief:
        yield from _repeated(subject, judge, case)


def _in_modes(subject: OperationSubject) -> Iterator[tuple[str, _Named]]:
    """Call the Operation in modes of torch that change no number. Yield the name of each mode, and the outputs."""
    with torch.no_grad():
        yield OperationForm.NO_GRAD, subject.call()
    with torch.inference_mode():
        yield OperationForm.INFERENCE, subject.call()
    changes: dict[str, Callable[[], object]] = {
        OperationForm.DEFAULT_BFLOAT16: lambda: torch.set_default_dtype(torch.bfloat16),
        OperationForm.DEFAULT_FLOAT64: lambda: torch.set_default_dtype(torch.float64),
        OperationForm.DETERMINISTIC: lambda: torch.use_deterministic_algorithms(True),
    }
    for form, change in changes.items():
        with process_settings.restored():
            change()
            seen = subject.call()
        yield form, seen
    device = subject.device.type
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        seen = subject.call()
    yield OperationForm.NO_AUTOCAST, seen


def _after_overwriting(subject: OperationSubject, judge: Callable[[str, _Named], Judgement]) -> Iterator[Judgement]:
    """Overwrite the outputs of a call. Yield judgements of the call's arguments and of the next call's outputs.

    Both must be as before. An output that is an argument itself is not overwritten, such as the A that LoRA-FA does not
    train.
    """
    given = cloned(subject.arguments)
    with torch.no_grad():
        arguments = operation_call.flatten(given)
        before = {name: t.clone() for name, t in arguments.items()}
        outputs = subject.operation.named(subject.function(**given)).values()
        for output in [one for one in outputs if not any(one is argument for argument in arguments.values())]:
            output.zero_()
        now = operation_call.flatten(given)
        yield prefix_tensor(OperationForm.OUTPUTS_OVERWRITTEN, exact(now, before))
        yield judge(OperationForm.EARLIER_OVERWRITTEN, subject.call())


def _gradients(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    """Yield judgements of the Operation's gradients.

    Backward is called for one argument alone, from one output alone, with other layouts of the incoming gradients, twice
    through one graph, with gradients of zeros, and with arguments that are not leaves.
    """
    differentiable, factor = subject.operation.differentiable, max(case.factor("calls"), case.factor("backward"))

    def judge(form: str, **how: Any) -> Judgement:
        return prefix_tensor(form, operation_call.judge_gradients(subject, case, factor, **how))

    # Of a list of adapters, the last alone: its neighbours are frozen.
    there = {name: name.partition("[")[0] for name in operation_call.flatten(subject.arguments)}
    items = {group: name for name, group in there.items() if name != group}
    alone = [name for name in differentiable if name in there.values() and name not in items]
    alone += [name for group, name in items.items() if group in differentiable]
    for name in alone if len(alone) > 1 else ():
        yield judge(OperationForm.ONE_GRADIENT.format(name), of=[name])
    layouts: dict[operation_call.Layout, str] = {
        "expanded": OperationForm.EXPANDED,
        "transposed": OperationForm.TRANSPOSED,
        "columns": OperationForm.COLUMNS,
    }
    for layout, form in layouts.items():
        yield judge(form, layout=layout)
    for name in subject.operation.outputs if len(subject.operation.outputs) > 1 else ():
        yield judge(OperationForm.ONE_OUTPUT.format(name), used=[name])
    yield judge(OperationForm.SECOND_BACKWARD, times=2)
    yield judge(OperationForm.ZEROS, zeros=True)
    yield judge(OperationForm.NO_LEAVES, leaves=False)
    for name in alone:
        yield from _changed_before_backward(subject, case, name)
    yield from _outputs_in_place(subject, case)
    if subject.dtype == "float32" and case.magnitude == "normal":
        yield from _second_order(subject, case)
    yield from _before_other_gradients(subject, case)


def _recorded(subject: OperationSubject, outputs: _Named) -> list[str]:
    """Return the names of the `outputs` that have a graph, although those of the reference have none."""
    own = subject.operation.named(subject.operation.reference(**_leaves(subject.arguments)))
    return [name for name, output in outputs.items() if output.grad_fn is not None and own[name].grad_fn is None]


def _views(subject: OperationSubject) -> str:
    """Return a message if the outputs keep much more memory than they need, for example of an optimizer's state.

    An output that is a view of an argument needs no memory of its own.
    """
    given = cloned(subject.arguments)
    storages = {t.untyped_storage().data_ptr() for t in operation_call.flatten(given).values()}
    of_storage: dict[int, list[Tensor]] = {}
    for output in subject.operation.named(subject.function(**given)).values():
        of_storage.setdefault(output.untyped_storage().data_ptr(), []).append(output)
    own = (outputs for place, outputs in of_storage.items() if place not in storages)
    found = (describe_views(outputs, _SPARE * outputs[0].element_size()) for outputs in own)
    return next(filter(None, found), "")


def _changed_before_backward(subject: OperationSubject, case: Case, name: str) -> Iterator[Judgement]:
    """Change the argument `name` in place between forward and backward, and yield a judgement of the gradients.

    Torch may refuse this backward pass. Otherwise the gradients are those of the forward pass.
    """
    outputs, leaves = operation_call.forward(subject, subject.function, DTYPES[subject.dtype])
    with torch.no_grad():
        leaves[name].mul_(-3)
    try:
        mine = operation_call.backward(outputs, leaves, case)
    except RuntimeError:
        return
    yield _as_usual(OperationForm.CHANGED_BEFORE_BACKWARD.format(name), subject, case, mine)


def _outputs_in_place(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    """Multiply the outputs in place before backward, and yield a judgement of the gradients.

    Torch may refuse this, for example because the backward pass needs an output.
    """
    outputs, leaves = operation_call.forward(subject, subject.function, DTYPES[subject.dtype])
    factors = {name: safe_factor(t.detach()) if t.requires_grad else 1.0 for name, t in outputs.items()}
    incoming = operation_call.incoming_gradients(outputs, case)
    incoming = {name: dy / factors[name] for name, dy in incoming.items()}
    try:
        multiplied = {name: t.mul_(factors[name]) if t.requires_grad else t for name, t in outputs.items()}
        mine = operation_call.backward(multiplied, leaves, case, incoming=incoming)
    except RuntimeError:
        return
    yield _as_usual(OperationForm.OUTPUTS_IN_PLACE, subject, case, mine)


def _second_order(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    """Differentiate the gradients, and yield a judgement of the second derivatives.

    An Operation may raise RuntimeError instead, or record no graph in its backward pass, as a kernel does.
    """

    def observed(one: OperationSubject, function: Callable[..., object], dtype: torch.dtype) -> _Named | None:
        outputs, leaves = operation_call.forward(one, function, dtype)
        used = {n: t for n, t in outputs.items() if t.requires_grad}
        incoming = operation_call.incoming_gradients(outputs, case)
        dys = {n: incoming[n].requires_grad_(True) for n in used}
        first = torch.autograd.grad(
            [*used.values()], [*leaves.values()], [*dys.values()], create_graph=True, allow_unused=True
        )
        generator = case.generator(salt=78)
        weights = [normal_noise(t.shape, generator) for t in leaves.values()]
        terms = [(g * w.to(g)).sum() for g, w in zip(first, weights, strict=True) if g is not None]
        total, given = sum(terms, torch.zeros(())), leaves | {f"the gradient of {n}": dy for n, dy in dys.items()}
        if not total.requires_grad:
            return None
        second = torch.autograd.grad(total, [*given.values()], allow_unused=True)
        pairs = zip(given.items(), second, strict=True)
        return {f"grad {n}": torch.zeros_like(t) if g is None else g for (n, t), g in pairs}

    def draws() -> Iterator[_Named]:
        near = ((subject, torch.float32), *operation_call.perturbed_subjects(subject, case))
        found = (observed(one, subject.operation.reference, dtype) for one, dtype in near)
        yield from (one for one in found if one is not None)

    truth = observed(subject, subject.operation.reference, torch.float64)
    try:
        mine = observed(subject, subject.function, torch.float32)
    except RuntimeError:
        return
    if truth is not None and mine is not None:
        verdict = noise_floor(mine, truth, draws(), subject.dtype, case.factor("calls"))
        yield prefix_tensor(OperationForm.SECOND_ORDER, verdict)


def _before_other_gradients(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    """Compute gradients by torch.autograd.grad, then others. Yield a judgement of the first if the others changed them."""
    found, before = list[_Named](), dict[str, Tensor]()
    for share in (1.0, HALF):
        outputs, leaves = operation_call.forward(subject, subject.function, DTYPES[subject.dtype])
        used = {n: t for n, t in outputs.items() if t.requires_grad}
        dys = [dy * share for n, dy in operation_call.incoming_gradients(outputs, case).items() if n in used]
        seen = torch.autograd.grad(list(used.values()), list(leaves.values()), dys, allow_unused=True)
        found.append({f"grad {n}": t for n, t in zip(leaves, seen, strict=True) if t is not None})
        before = before or cloned(found[0])
    if not _same(found[0], before):
        yield _as_usual(OperationForm.LATER_GRADIENTS, subject, case, found[0])


def _as_usual(form: str, subject: OperationSubject, case: Case, mine: _Named) -> Judgement:
    """Judge the gradients `mine` by those that the reference computes in a plain call."""
    return prefix_tensor(form, operation_call.judge_gradients(subject, case, case.factor("calls"), mine=mine))


def _alive_after_calls(subject: OperationSubject, case: Case) -> list[str]:
    """Call the Operation and its backward pass, drop everything, and name the inputs that are still in memory.

    Only the inputs of a layer count, such as x. An Operation may keep a weight, or a factor that it has cast.
    """
    outputs, leaves = operation_call.forward(subject, subject.function, DTYPES[subject.dtype])
    watch = StorageWatch({name: leaf for name, leaf in leaves.items() if name in subject.operation.inputs})
    operation_call.backward(outputs, leaves, case)
    del outputs
    leaves.clear()
    return watch.alive()


def _repeated(subject: OperationSubject, judge: Callable[[str, _Named], Judgement], case: Case) -> Iterator[Judgement]:
    """Call the Operation many times. Yield judgements of the first outputs and gradients that differ from the first call's.

    With large arguments there are only two calls, without gradients.
    """
    large = is_large(operation_call.flatten(subject.arguments).values())
    times = 2 if large else LONG_RUN if case.walks and not case.is_drawn else REPEATS
    if subject.operation.differentiable and not large:
        yield from _repeated_gradients(subject, case)
    first, given = _detached(subject.call()), cloned(subject.arguments)
    clones = not _same(_called(subject, given), first)  # where the call changes its arguments
    calls = (subject.call() if clones else _called(subject, given) for _ in range(times))
    yield judge(OperationForm.REPEATED.format(times), next((one for one in calls if not _same(one, first)), first))


def _repeated_gradients(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    def gradients(function: Callable[..., object], dtype: torch.dtype) -> _Named:
        return operation_call.gradients(subject, function, dtype, case)

    own, reference = DTYPES[subject.dtype], subject.operation.reference
    first = gradients(subject.function, own)
    later = (gradients(subject.function, own) for _ in range(REPEATS))
    odd = next((one for one in later if not _same(one, first)), None)
    if odd is not None:
        wide, rounded = gradients(reference, torch.float64), gradients(reference, own)
        verdict = noise_floor(odd, wide, rounded, subject.dtype, case.factor("calls"))
        yield prefix_tensor(OperationForm.REPEATED_BACKWARD, verdict)


def _called(subject: OperationSubject, given: dict[str, Any]) -> _Named:
    with torch.no_grad():
        return subject.operation.named(subject.function(**given))


def _in_threads(subject: OperationSubject, alone: _Named) -> _Named:
    """Call the Operation in several threads at once, each with other numbers. Return outputs that differ from `alone`.

    alone: the outputs without other threads. Only outputs for the subject's own arguments are returned. If none differ,
    return `alone`.
    """
    others = [subject.arguments, *(subject.another() for _ in range(THREADS - 1))]
    given = [[cloned(one) for _ in range(4)] for one in others]  # before the threads start, so that they overlap
    mine, *_ = at_once(lambda calls: [_called(subject, one) for one in calls], given)
    return next((one for one in mine if not _same(one, alone)), alone)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two dicts have tensors with equal values. NaN equals NaN."""
    return all(exact({n: one[n]}, {n: other[n]}).passed for n in other)


def _judge_changed(
    subject: OperationSubject, case: Case, form: str, arguments: Mapping[str, Any], *, in_place: Sequence[str] = ()
) -> Judgement:
    """Call the Operation twice with different numbers, and judge the second call.

    By default, the first call gets the subject's own arguments, and the second call gets `arguments`. If `in_place` has
    names of arguments, both calls get the same tensors, and the tensors with these names are changed in between.
    """
    given = cloned(dict(arguments))
    with torch.no_grad():
        subject.function(**(given if in_place else cloned(subject.arguments)))
        if in_place:
            operation_call.map_tensors({name: given[name] for name in in_place}, _change)
        changed = replace(subject, arguments=cloned(given))
        mine = subject.operation.named(subject.function(**given))
    found = [one for one, _ in operation_call.judgements(changed, mine, case)]
    return prefix_tensor(form, worst_of(found, "as outputs"))


def _change(tensor: Tensor) -> Tensor:
    """Halve a floating-point tensor in place, or shift codes by one place, without a change of `_version`."""
    return tensor.data.mul_(HALF) if tensor.is_floating_point() else tensor.data.copy_(tensor.roll(1, 0))


def _detached(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in named.items()}


def _leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return operation_call.map_floats(cloned(dict(arguments)), lambda t: t.requires_grad_(True))
