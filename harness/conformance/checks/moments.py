"""Check of the 8-bit moments of a Method's own optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.galore_steps import (
    Step,
    judge_optimizer,
    new_optimizer,
    numbers_of_bits,
    steps_of_subject,
)
from harness.conformance.comparison.kept_memory import tensors_in
from harness.conformance.comparison.tolerance_policies import Judgement, worst_of
from harness.conformance.subject import Subject
from harness.errors import Unsupported
from harness.methods.module_copy import copied
from harness.records.record import CheckResult

_BLOCK = 256
"""Number of moments with one absmax."""
_CLEAR = (1.0, 0.885, 0.793, 0.596, 0.463, 0.336, 0.215, 0.124, 0.011)
"""Absolute values of gradients whose 8-bit moments round to the same codes in every precision, because they and their
squares are far from the middle of two codes. The first one is the largest."""
_ELEMENTS = 4096
"""Number of elements from which moments are kept in 8 bits."""
_SIDE = 64
"""Side of the square parameter of `_ELEMENTS` elements."""


@check(depends_on_sizes=False, only_wide=True, also_in_typical_case=True)
def check_moments(subject: Subject, case: Case) -> CheckResult:
    """With bits=8, the Method's own optimizer keeps moments of 4096 elements in 8 bits, and smaller ones in 32 bits.

    The optimizer takes two steps with two parameters that are not projected, of 4096 and of 4095 elements. They must move
    as the reference moves them, also if the larger one is transposed in memory. M is coded by the signed map, and V by
    the unsigned one. The smaller moments are in 32 bits even if the parameter has 16.
    """
    fresh = case.attach_again()
    if fresh is None or fresh.original.model is None or fresh.adapted.optimizer(0.1, 0.0) is None:
        return skipped(subject, case, "moments", "the Method has no optimizer, or the case cannot attach again")
    if len(numbers_of_bits(fresh)) == 1:
        return skipped(subject, case, "moments", "the optimizer has no 8-bit moments")
    found = []
    for layout, transposed in (("", False), (", transposed in memory", True)):
        verdict = _two_steps(fresh.original.model, case, transposed=transposed)
        found.append(prefix_tensor(f"with bits=8{layout}", verdict))
        if not verdict.passed:
            break
    else:
        if narrow := _in_16_bits(fresh, case):
            return from_problems(subject, case, "moments", narrow)
    return judged(subject, case, "moments", worst_of(found, found[0].policy))


def _two_steps(original: nn.Module, case: Case, *, transposed: bool) -> Judgement:
    """Take two steps with bits=8 of a parameter of 4096 elements and of one of 4095, and judge the parameters.

    original: the model before attaching. transposed: whether the larger parameter, 64 x 64, is transposed in memory. Each
    block of its moments has the same absmax, both in the order of its rows and in that of its columns.
    """
    model: Any = copied(original)
    of = model.other
    weight = of.weight.new_zeros(_SIDE, _SIDE)
    of.weight = nn.Parameter(weight.T if transposed else weight)
    of.bias = nn.Parameter(of.weight.new_zeros(_ELEMENTS - 1))
    fresh = case.attach_again(model=model, train_rest=True)
    assert fresh is not None  # noqa: S101  # it was attached before
    tensors = {"of 4096 elements": of.weight, "of 4095 elements": of.bias}
    steps = []
    for salt in range(2):
        chosen = torch.randint(len(_CLEAR), (_ELEMENTS,), generator=case.generator(salt))
        signs = torch.randint(2, (_ELEMENTS,), generator=case.generator(salt + 2)) * 2 - 1
        largest = torch.arange(0, _SIDE, _BLOCK // _SIDE) * (_SIDE + 1)  # on the diagonal
        chosen[largest], signs[largest] = 0, 1
        flat = torch.tensor(_CLEAR, dtype=torch.float64)[chosen] * signs
        steps.append(Step({name: flat[: t.numel()].view(t.shape).to(t.device) for name, t in tensors.items()}))
    mine, _ = steps_of_subject(fresh, tensors, steps, bits=8)
    return judge_optimizer(fresh, case, tensors, steps, mine, 8)


def _in_16_bits(fresh: Subject, case: Case) -> list[str]:
    """Take a step with bits=8 in a model in bfloat16. Return a message if moments of 4095 elements are in 16 bits.

    Nothing is judged if the Method refuses this model, or if the state has other tensors of this size in more bits.
    """
    assert fresh.original.model is not None  # noqa: S101  # `check_moments` begins with this question
    model: Any = copied(fresh.original.model).to(torch.bfloat16)
    try:
        narrow = case.attach_again(model=model, train_rest=True)
    except (Unsupported, ValueError):
        return []
    assert narrow is not None  # noqa: S101  # it was attached before
    optimizer, small = new_optimizer(narrow, 8), model.other.bias
    small.grad = torch.ones_like(small)
    optimizer.step()
    found = {t.dtype for t in tensors_in(optimizer.state[small]) if t.numel() == small.numel()}
    if not found <= {torch.bfloat16, torch.float16}:
        return []
    return [f"moments of 4095 elements are in {one}" for one in found]
