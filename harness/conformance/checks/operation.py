"""Whether an Operation computes what its reference computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.operations import OperationSubject, cloned, mapped
from harness.conformance.poisoned import fresh_memory
from harness.conformance.results import judged, listed, skipped
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance import Judgement, exact, noise_floor, perturbed, worst_of
from harness.records import CheckResult
from harness.tolerances import PERTURBED_DRAWS


def check_outputs(subject: OperationSubject, case: Case) -> CheckResult:
    """Every output of the Operation is the reference's: bit for bit where it is a code, else within the noise floor."""
    return judged(subject, case, "outputs", *_judge(subject, subject.call(), case))


def check_output_codes(subject: OperationSubject, case: Case) -> CheckResult:
    """Every code that the Operation returns is that of the nearest value, but where rounding decides between two."""
    if subject.operation.codes is None:
        return skipped(subject, case, "output_codes", "this Operation returns no codes, or `outputs` judges them")
    return judged(subject, case, "output_codes", *subject.operation.codes(subject.call(), subject.arguments))


def check_backward(subject: OperationSubject, case: Case) -> CheckResult:
    """The gradients that reach the Operation's differentiable arguments are the reference's; none counts as zero."""
    if not subject.operation.differentiable:
        return skipped(subject, case, "backward", "this Operation has no gradient")
    mine = _gradients(subject, subject.function, DTYPES[subject.dtype], case)
    truth = _gradients(subject, subject.operation.reference, torch.float64, case)
    rounded = _gradients(subject, subject.operation.reference, DTYPES[subject.dtype], case)
    return judged(subject, case, "backward", noise_floor(mine, truth, rounded, subject.dtype, case.factor("backward")))


def check_arguments(subject: OperationSubject, case: Case) -> CheckResult:
    """A call leaves its arguments as they were."""
    given = cloned(subject.arguments)
    subject.function(**given)
    return judged(subject, case, "arguments", exact(_told(_flat(given)), _told(_flat(subject.arguments))))


def check_repeatable(subject: OperationSubject, case: Case) -> CheckResult:
    """Two calls with the same arguments return the same, to the last bit."""
    first = {name: t.detach().clone() for name, t in subject.call().items()}
    return judged(subject, case, "repeatable", exact(_told(subject.call()), _told(first)))


def check_layouts(subject: OperationSubject, case: Case) -> CheckResult:
    """The outputs are the same when every floating argument is a view with gaps between its elements, or is transposed in
    memory: what a slice or a `.T` hands on.

    The same to the last bit, or, since another layout may take another path, as right as `outputs` demands.
    """
    plain, found = subject.call(), []
    for name, change in (("every second element", _gapped), ("transposed", _transposed)):
        given = _changed(cloned(subject.arguments), change)
        mine = subject.operation.named(subject.function(**given))
        verdict = exact(_told(mine), _told(plain))
        if not verdict.passed:
            verdict = worst_of([one for one, _ in _judgements(subject, mine, case)], "as outputs")
        found.append(replace(verdict, tensor=f"{name}: {verdict.tensor}"))
    return judged(subject, case, "layouts", worst_of(found, "exact"))


def check_written(subject: OperationSubject, case: Case) -> CheckResult:
    """No output and no gradient holds memory that was never written: with every fresh buffer filled with NaN, or with the
    largest integer, none of it shows.

    Uses torch's own switch for it (`torch.utils.deterministic.fill_uninitialized_memory`).
    """
    dtype, differentiable = DTYPES[subject.dtype], bool(subject.operation.differentiable)

    def seen() -> dict[str, Tensor]:
        gradients = _gradients(subject, subject.function, dtype, case) if differentiable else {}
        return {n: t.detach().clone() for n, t in subject.call().items()} | gradients

    clean = seen()
    with fresh_memory():
        poisoned = seen()
    odd = [
        f"{name} holds what was never written"
        for name, t in poisoned.items()
        if bool((t.isnan() & ~clean[name].isnan()).any() if t.is_floating_point() else (t != clean[name]).any())
    ]
    return listed(subject, case, "written", odd)


def _judge(subject: OperationSubject, mine: dict[str, Tensor], case: Case) -> tuple[Judgement, str]:
    """Judge outputs by the Operation's own rule, or by the noise floor."""
    if subject.operation.judge is not None:
        return subject.operation.judge(mine, subject.arguments)
    draws = [_reference(subject, cloned(subject.arguments))]
    exactly = cloned(subject.arguments, {DTYPES[subject.dtype]: torch.float64})
    draws += [
        _reference(subject, _moved(exactly, subject.dtype, case.generator(salt=70 + salt)))
        for salt in range(PERTURBED_DRAWS)
    ]
    truth = _reference(subject, exactly)
    return noise_floor(mine, truth, draws, subject.dtype, case.factor("outputs")), ""


def _judgements(subject: OperationSubject, mine: dict[str, Tensor], case: Case) -> Iterator[tuple[Judgement, str]]:
    """Judge outputs by all rules that there are for them."""
    yield _judge(subject, mine, case)
    if subject.operation.codes is not None:
        yield subject.operation.codes(mine, subject.arguments)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every floating tensor inside arguments, but single numbers."""

    def one(it: Any) -> Any:
        return change(it) if isinstance(it, Tensor) and it.is_floating_point() and it.dim() else it

    return mapped(value, one)


def _gapped(tensor: Tensor) -> Tensor:
    """Return it as every second element of a buffer that is NaN between them."""
    wide = tensor.new_full((*tensor.shape, 2), torch.nan)
    wide[..., 0] = tensor
    return wide[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    """Return it with its last dimension the slowest in memory; a vector stays what it is."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _moved(exactly: Any, dtype: str, generator: torch.Generator) -> Any:
    """Return arguments in float64 whose elements are off by what rounding them to `dtype` may take."""
    return _changed(exactly, lambda t: perturbed(t, dtype, generator) if t.dtype == torch.float64 else t)


def _reference(subject: OperationSubject, arguments: dict[str, Any]) -> dict[str, Tensor]:
    return subject.operation.named(subject.operation.reference(**cloned(arguments)))


def _gradients(subject: OperationSubject, function: Any, dtype: torch.dtype, case: Case) -> dict[str, Tensor]:
    given = cloned(subject.arguments, {DTYPES[subject.dtype]: dtype})
    leaves = {n: t for n, t in _flat(given).items() if n.partition("[")[0] in subject.operation.differentiable}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    y = next(iter(subject.operation.named(function(**given)).values()))
    dy = torch.randn(y.shape, generator=case.generator(salt=3), dtype=torch.float64)
    y.backward(dy.to(y.device, y.dtype))
    return {f"grad {n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def _told(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Say apart what is not finite and how, so that a NaN which stays where it was is no difference."""
    finite = {name: t.detach().nan_to_num(0.0, 0.0, 0.0) for name, t in named.items()}
    how = {f"{n}, NaN or infinite": t.isnan() + 2 * t.isposinf() + 3 * t.isneginf() for n, t in named.items()}
    return finite | how


def _flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """Name every tensor inside arguments: `x`, `As[0]`."""
    if isinstance(value, Tensor):
        return {name: value}
    found: dict[str, Tensor] = {}
    if isinstance(value, dict):
        for key, one in value.items():
            found |= _flat(one, f"{name}[{key}]" if name else key)
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            found |= _flat(one, f"{name}[{index}]")
    return found
