"""Whether an Operation computes what its reference computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.operations import OperationSubject, cloned
from harness.conformance.results import judged, skipped
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance import exact, noise_floor
from harness.records import CheckResult


def check_outputs(subject: OperationSubject, case: Case) -> CheckResult:
    """Every output of the Operation is the reference's: bit for bit where it is a code, else within the noise floor."""
    mine = subject.call()
    if subject.operation.judge is not None:
        return judged(subject, case, "outputs", *subject.operation.judge(mine, subject.arguments))
    truth, rounded = (_reference(subject, dtype) for dtype in ("float64", subject.dtype))
    return judged(subject, case, "outputs", noise_floor(mine, truth, rounded, subject.dtype, case.factor("outputs")))


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


def _reference(subject: OperationSubject, dtype: str) -> dict[str, Tensor]:
    become = {DTYPES[subject.dtype]: DTYPES[dtype]}
    return subject.operation.named(subject.operation.reference(**cloned(subject.arguments, become)))


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
