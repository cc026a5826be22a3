"""Call an Operation (one function, such as a fused kernel) forward and backward, and judge its outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.comparison.check_results import prefix_tensor
from harness.conformance.comparison.inputs import columns_of_wider
from harness.conformance.comparison.moved_numbers import perturbed, with_error_of_float64
from harness.conformance.comparison.tolerance_policies import ROUNDED_SUMS, Judgement, exact, noise_floor, worst_of
from harness.conformance.normal_noise import normal_noise
from harness.conformance.operation import Arguments, Judge, OperationSubject, cloned, mapped
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import (
    GAPPED_ULPS,
    LARGEST_OVERFLOW,
    LAYER_DRAWS,
    PERTURBED_DRAWS,
    REORDERED_DRAWS,
    REORDERED_ULPS,
    ROUNDED_ULPS,
)

_T = TypeVar("_T")
Layout = Literal["plain", "expanded", "transposed", "columns"]
"""Layout of the gradient of an output. `plain`: contiguous. `expanded`: one number expanded, as `y.sum()` sends it.
`transposed`: transposed in memory, as `y.T` sends it. `columns`: a part of each row, as `torch.cat` sends it."""
_NARROW = {torch.float64: torch.float32}


def judge(
    subject: OperationSubject, mine: dict[str, Tensor], case: Case, given: Arguments | None = None
) -> tuple[Judgement, str]:
    """Judge the outputs `mine` of a call. Return the judgement, and details as text.

    First, dtype, shape and device must equal the reference's. Then the values are judged by the Operation's own rule.
    If the Operation has no rule, they must be within the noise floor of the reference.

    given: a copy of the call's arguments if they have another memory layout than the subject's, else None. The
    reference is then also called with `given`, because this layout may change the order of its sums.
    """
    if given is not None:
        return _judge(subject, mine, case, given)
    return subject.known.judgement("outputs", case, mine, lambda: _judge(subject, mine, case, None))


def judge_codes(subject: OperationSubject, codes: Judge, mine: dict[str, Tensor], case: Case) -> tuple[Judgement, str]:
    """Judge the quantisation codes in the outputs `mine` of a call by the Operation's rule `codes`."""
    return subject.known.judgement("codes", case, mine, lambda: codes(mine, subject.arguments))


def _judge(
    subject: OperationSubject, mine: dict[str, Tensor], case: Case, given: Arguments | None
) -> tuple[Judgement, str]:
    own = reference_outputs(subject, DTYPES[subject.dtype])
    if (odd := ill_formed(mine, own)) is not None:
        return odd, ""
    if subject.operation.judge is not None:
        return subject.operation.judge(mine, subject.arguments)
    truth = reference_outputs(subject, torch.float64)

    def draws() -> Iterator[dict[str, Tensor]]:
        yield own
        if given is not None:
            yield subject.operation.named(subject.operation.reference(**given))
        if subject.dtype == "float64":
            yield with_error_of_float64(_reference(subject, cloned(subject.arguments, _NARROW)), truth)
        yield from (_reference(subject, near.arguments) for near, _ in perturbed_subjects(subject, case))
        for one in _perturbed_with_gaps(subject, given, case) if given is not None else ():
            yield subject.operation.named(subject.operation.reference(**one))  # a clone would have no gaps

    verdict = noise_floor(mine, truth, draws(), subject.dtype, case.factor("outputs"))
    if verdict.passed or not verdict.nonfinite or case.magnitude == "normal":
        return verdict, ""
    possible = without_overflows(subject, mine, truth)
    return noise_floor(possible, truth, draws(), subject.dtype, case.factor("outputs")), ""


def ill_formed(mine: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Judgement | None:
    """Return a failure for the first tensor whose dtype, shape or device differs from the reference's.

    If there is no such tensor, return None.
    """
    for name in mine.keys() & own.keys():
        forms = ({"dtype": t.dtype, "shape": tuple(t.shape), "device": t.device} for t in (mine[name], own[name]))
        for (part, have), want in zip(next(forms).items(), next(forms).values(), strict=True):
            if have != want:
                return Judgement(False, None, None, name, f"{part} {have}, should be {want}", "exact", 0)
    return None


def judgements(
    subject: OperationSubject, mine: dict[str, Tensor], case: Case, given: Arguments | None = None
) -> Iterator[tuple[Judgement, str]]:
    """Judge the outputs `mine` by each rule of the Operation. Yield pairs (judgement, details).

    given: a copy of the call's arguments if they have another memory layout than the subject's, else None.
    """
    yield judge(subject, mine, case, given)
    if subject.operation.codes is not None:
        yield judge_codes(subject, subject.operation.codes, mine, case)


def judge_form(
    form: str,
    subject: OperationSubject,
    mine: dict[str, Tensor],
    plain: dict[str, Tensor],
    case: Case,
    given: Arguments | None = None,
) -> Judgement:
    """Judge the outputs `mine` of a call in another form, such as another memory layout. Return the judgement.

    plain: the outputs of an ordinary call. Outputs that equal these to the last bit pass. Other outputs must pass the
    rules of the Operation, since the form may take another path through the code. form: name of the form. given: a
    copy of the call's arguments if they have another memory layout than the subject's, else None.
    """
    verdict = ill_formed(mine, plain) or exact(mine, plain)
    if not verdict.passed:
        verdict = worst_of([one for one, _ in judgements(subject, mine, case, given)], "as outputs")
    return prefix_tensor(form, verdict)


def forward(
    subject: OperationSubject,
    function: Callable[..., object],
    dtype: torch.dtype,
    of: Collection[str] | None = None,
    *,
    leaves: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Call `function` on the subject's arguments, cast to `dtype`. Return the outputs, and the arguments in `of`.

    of: names of the arguments that need a gradient, or of items of lists such as `As[0]`; by default all differentiable
    arguments. leaves: if False, these arguments are results of another operator, as in the middle of a model.
    """
    given = cloned(subject.arguments, {DTYPES[subject.dtype]: dtype})
    found = require_gradients(subject, given, of)
    if not leaves:
        given = mapped(given, lambda one: one * 1 if isinstance(one, Tensor) and one.requires_grad else one)
    return subject.operation.named(function(**given)), found


def require_gradients(
    subject: OperationSubject, given: Arguments, of: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Let the arguments named in `of` require a gradient, and return them by name.

    given: all arguments. of: by default, all differentiable arguments.
    """
    wanted = subject.operation.differentiable if of is None else of
    found = {n: t for n, t in flatten(given).items() if n in wanted or n.partition("[")[0] in wanted}
    for leaf in found.values():
        leaf.requires_grad_(True)
    return found


def incoming_gradients(outputs: Mapping[str, Tensor], case: Case, layout: Layout = "plain") -> dict[str, Tensor]:
    """Return a random gradient for each output, by the output's name. The same case gives the same numbers."""
    generator, dys = case.generator(salt=3), dict[str, Tensor]()
    for name, y in outputs.items():
        drawn = (1,) * y.dim() if layout == "expanded" else y.shape
        dy = normal_noise(drawn, generator).to(y.device, y.dtype).expand(y.shape)
        if layout == "transposed" and y.dim() > 1:
            dy = dy.transpose(0, -1).contiguous().transpose(0, -1)
        dys[name] = columns_of_wider(dy) if layout == "columns" else dy
    return dys


def backward(
    outputs: Mapping[str, Tensor],
    leaves: dict[str, Tensor],
    case: Case,
    *,
    layout: Layout = "plain",
    used: Collection[str] | None = None,
    times: int = 1,
    zeros: bool = False,
    incoming: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run backward from the outputs with random gradients. Return the gradient of each leaf as `grad <name>`.

    A leaf that gets no gradient has zeros. layout: memory layout of the random gradients. used: names of the outputs
    that get a gradient; by default all. times: number of backward passes through the same graph. Only the gradients of
    the last pass are returned. zeros: begin with gradients of zeros, as `zero_grad(set_to_none=False)` leaves them.
    incoming: the gradient of each output, in place of a random one. The last pass gets these tensors, not copies.
    """
    incoming = incoming_gradients(outputs, case, layout) if incoming is None else incoming
    given = [name for name, y in outputs.items() if y.requires_grad and (used is None or name in used)]
    starts, dys = [outputs[name] for name in given], [incoming[name] for name in given]
    for left in reversed(range(times if starts else 0)):
        for leaf in leaves.values():
            leaf.grad = torch.zeros_like(leaf) if zeros else None
        torch.autograd.backward(starts, [dy.clone() for dy in dys] if left else dys, retain_graph=left > 0)
    return {f"grad {n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def gradients(
    subject: OperationSubject,
    function: Callable[..., object],
    dtype: torch.dtype,
    case: Case,
    of: Collection[str] | None = None,
    *,
    leaves: bool = True,
    **how: Any,
) -> dict[str, Tensor]:
    """Compute the gradient of each argument in `of`, and return it as `grad <name>`.

    function: the Operation or its reference, called in `dtype`. of: by default all differentiable arguments. leaves:
    False if these arguments are results of another operator. how: options of `backward`.
    """
    return backward(*forward(subject, function, dtype, of, leaves=leaves), case, **how)


def reference_outputs(subject: OperationSubject, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the reference's outputs for the subject's arguments, cast to `dtype`. Later calls return the same result."""
    arguments = subject.arguments
    return subject.known.once(
        ("outputs", dtype), lambda: _reference(subject, cloned(arguments, {DTYPES[subject.dtype]: dtype}))
    )


def reference_gradients(subject: OperationSubject, dtype: torch.dtype, case: Case) -> dict[str, Tensor]:
    """Return the reference's gradients of all differentiable arguments, computed in `dtype`.

    Later calls return the same result.
    """
    reference = subject.operation.reference
    return subject.known.once(("gradients", dtype, case.seed), lambda: gradients(subject, reference, dtype, case))


def judge_gradients(
    subject: OperationSubject,
    case: Case,
    factor: float,
    of: Collection[str] | None = None,
    *,
    mine: dict[str, Tensor] | None = None,
    **how: Any,
) -> Judgement:
    """Judge the gradients of the arguments in `of`: their values, shapes and dtypes.

    factor: allowed error, as a multiple of the reference's. of: by default all differentiable arguments. mine: the
    gradients to judge; by default, those of a call. how: options of `gradients`.
    """

    def computed(one: OperationSubject, function: Callable[..., object], dtype: torch.dtype) -> dict[str, Tensor]:
        return gradients(one, function, dtype, case, of, **how)

    reference, own = subject.operation.reference, DTYPES[subject.dtype]
    mine = computed(subject, subject.function, own) if mine is None else mine
    if of is None and not how:
        truth, rounded = (reference_gradients(subject, dtype, case) for dtype in (torch.float64, own))
    else:
        truth, rounded = (computed(subject, reference, dtype) for dtype in (torch.float64, own))

    def draws() -> Iterator[dict[str, Tensor]]:
        yield rounded
        if subject.dtype == "float64":
            yield with_error_of_float64(computed(subject, reference, torch.float32), truth)
        yield from (computed(one, reference, dtype) for one, dtype in perturbed_subjects(subject, case))

    if (odd := ill_formed(mine, rounded)) is not None:
        return odd
    verdict = noise_floor(mine, truth, draws(), subject.dtype, factor)
    if verdict.passed or not verdict.nonfinite or case.magnitude == "normal":
        return verdict
    bounds = _gradients_of_absolutes(subject, case, how.get("layout", "plain"), how.get("used"))
    return noise_floor(_without_overflows(mine, truth, bounds), truth, draws(), subject.dtype, factor)


def without_overflows(
    subject: OperationSubject, mine: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the outputs `mine`, with the right values where an infinity or NaN is possible in a correct program."""
    arguments = _absolute(subject).arguments
    bounds = _reference(subject, arguments)
    if subject.operation.unscaled is not None:
        unscaled = subject.operation.named(subject.operation.unscaled(**arguments))
        bounds = {name: torch.maximum(bound, unscaled[name]) for name, bound in bounds.items()}
    return _without_overflows(mine, truth, bounds)


def _without_overflows(
    mine: Mapping[str, Tensor], truth: Mapping[str, Tensor], bounds: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return `mine`, with the right values where an infinity or NaN is possible in a correct program.

    A program may scale after a sum and the reference before it, or the other way round. So an intermediate result may
    overflow only in one of them. bounds: results for the absolute values of all arguments, with a scaling of at least 1. An
    element is replaced only where its bound overflows, and only if such elements are less than half of the tensor.
    """

    def excused(name: str, value: Tensor) -> Tensor:
        odd = ~value.isfinite() & ~bounds[name].isfinite()
        few = odd.double().mean() < LARGEST_OVERFLOW
        return torch.where(odd & few, truth[name].to(value.dtype), value)

    return {name: excused(name, value) for name, value in mine.items()}


def _absolute(subject: OperationSubject) -> OperationSubject:
    """Return the subject with the absolute values of all floating-point arguments, and with a scaling of at least 1."""
    absolute = map_floats(subject.arguments, torch.abs)
    for name in absolute.keys() & {"scaling", "scalings"}:
        absolute[name] = mapped(absolute[name], lambda one: max(1.0, abs(one)) if isinstance(one, float) else one)
    return replace(subject, arguments=absolute)


def _gradients_of_absolutes(
    subject: OperationSubject, case: Case, layout: Layout, used: Collection[str] | None
) -> dict[str, Tensor]:
    """Return the reference's gradients for absolute arguments and absolute gradients of the outputs.

    layout: that of `incoming_gradients`, which decides the numbers. used: names of the outputs that get a gradient; None
    for all.
    """
    outputs, leaves = forward(_absolute(subject), subject.operation.reference, DTYPES[subject.dtype])
    incoming = {name: dy.abs() for name, dy in incoming_gradients(outputs, case, layout).items()}
    return backward(outputs, leaves, case, used=used, incoming=incoming)


def map_tensors(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """Return arguments with `change` applied to every tensor that is not 0-d."""
    return mapped(value, lambda one: change(one) if isinstance(one, Tensor) and one.dim() else one)


def map_floats(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """Return arguments with `change` applied to every floating-point tensor that is not 0-d."""

    def one(it: object) -> object:
        return change(it) if isinstance(it, Tensor) and it.is_floating_point() and it.dim() else it

    return mapped(value, one)


def flatten(value: object, name: str = "") -> dict[str, Tensor]:
    """Return the tensors inside arguments. Their names are positions, such as `x` and `As[0]`."""
    if isinstance(value, Tensor):
        return {name: value}
    found: dict[str, Tensor] = {}
    if isinstance(value, dict):
        for key, one in value.items():
            found |= flatten(one, f"{name}[{key}]" if name else key)
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            found |= flatten(one, f"{name}[{index}]")
    return found


def perturbed_subjects(subject: OperationSubject, case: Case) -> Iterator[tuple[OperationSubject, torch.dtype]]:
    """Yield copies of the subject with slightly moved arguments, each with the dtype to compute in.

    Each argument is moved by up to half a unit in the last place of the subject's dtype. A subject in 16 bits must be
    computed in float64. Any other subject is computed in its own dtype, so that its sums are rounded differently, too;
    in its last draws, the arguments move further, as far as sums in another order move the result.
    """
    own = DTYPES[subject.dtype]
    dtype = own if subject.dtype in ROUNDED_SUMS else torch.float64
    given = cloned(subject.arguments, {own: dtype})
    for salt in range(LAYER_DRAWS):
        generator = case.generator(salt=70 + salt)
        reordered = subject.dtype in ROUNDED_SUMS and salt >= LAYER_DRAWS - REORDERED_DRAWS
        ulps = REORDERED_ULPS if reordered else ROUNDED_ULPS

        def move(t: Tensor, generator: torch.Generator = generator, ulps: float = ulps) -> Tensor:
            return perturbed(t, subject.dtype, generator, ulps) if t.dtype == dtype else t

        yield replace(subject, arguments=map_floats(given, move)), dtype


def _perturbed_with_gaps(subject: OperationSubject, given: Arguments, case: Case) -> Iterator[Arguments]:
    """Yield copies of `given` with slightly moved numbers and the same strides, if a tensor has gaps between its elements.

    Torch sums such a tensor in another order than a contiguous one, and loses more. In 16 bits, yield nothing.
    """
    has_gaps = any(t.numel() > 1 and min(t.stride(), default=1) > 1 for t in flatten(given).values())
    for salt in range(PERTURBED_DRAWS if has_gaps and subject.dtype in ROUNDED_SUMS else 0):
        generator = case.generator(salt=170 + salt)

        def move(t: Tensor, generator: torch.Generator = generator) -> Tensor:
            place = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            return place.copy_(perturbed(t, subject.dtype, generator, GAPPED_ULPS))

        yield map_floats(given, move)


def _reference(subject: OperationSubject, arguments: Arguments) -> dict[str, Tensor]:
    return subject.operation.named(subject.operation.reference(**cloned(arguments)))
