"""Calls of an Operation with special values of one argument: zero, as many tensors are when training starts, or shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.tolerance_policies import Judgement, worst_of
from harness.conformance.operation import OperationSubject, mapped
from harness.errors import Unsupported

_WIDER = 2.0
"""Factor on the allowed error of gradients. The rounding of a tensor of zeros shows in no plausible result, so that these
results differ less from each other than usual."""


def with_zeros(subject: OperationSubject, case: Case) -> Iterator[tuple[str, Judgement]]:
    """Call the Operation with zeros in place of each floating-point argument in turn. Yield the name and a judgement.

    B is zero when the training of LoRA starts, and the gradient of a frozen or unused tensor is zero. The Operation must
    still compute what the reference computes, with all gradients. A list of tensors is zero as a whole. Only a case in
    float32 with plain numbers is tried.
    """
    if subject.dtype != "float32" or case.magnitude != "normal":
        return
    for name, value in subject.arguments.items():
        tensors = operation_call.flatten({name: value}).values()
        possible = name not in subject.operation.never_zero
        if possible and any(t.is_floating_point() and t.numel() for t in tensors):
            yield from _judged(subject, case, name, mapped(value, _zero))


def with_shared_tensors(subject: OperationSubject, case: Case) -> Iterator[tuple[str, Judgement]]:
    """Call the Operation with one tensor as several items of each list in turn. Yield the name and a judgement.

    Several adapters may share one frozen A, for example. Items of one shape share the first item of this shape.
    """
    for name, value in subject.arguments.items():
        items = value if isinstance(value, list) and all(map(_is_float, value)) else []
        shared = dict[torch.Size, Tensor]()
        of_shape = [shared.setdefault(one.shape, one) for one in items]
        if len(shared) < len(items):
            yield from _judged(subject, case, name, of_shape)


def _judged(subject: OperationSubject, case: Case, name: str, value: Any) -> Iterator[tuple[str, Judgement]]:
    """Yield `name` and a judgement of a call with another value of this argument: of its outputs and its gradients.

    Yield nothing if the implementation does not support this value.
    """
    other = replace(subject, arguments={**subject.arguments, name: value})
    try:
        found = [one for one, _ in operation_call.judgements(other, other.call(), case)]
        if subject.operation.differentiable:
            found.append(operation_call.judge_gradients(other, case, _WIDER * case.factor("calls")))
    except Unsupported:
        return
    yield name, worst_of(found, found[0].policy)


def _zero(value: object) -> object:
    """Return zeros in place of a floating-point tensor, and anything else as it is."""
    return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
