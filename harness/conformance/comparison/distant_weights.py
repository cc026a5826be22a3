"""Call an Operation on stacked weights that lie far apart in memory, so that their offsets do not fit 32 bits.

A stack of experts of a large model has more than 2**31 elements. Here the matrices of a small stack have gaps between
them, which no program reads. Memory that is never touched takes no space on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.operation_forms import OperationForm
from harness.conformance.comparison.tolerance_policies import Judgement
from harness.conformance.operation import OperationSubject, cloned

_OFFSET = 2**31
"""Smallest offset, in elements, of the last matrix of a stack. It is too large for a signed number of 32 bits."""


def on_distant_weights(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    """Yield a judgement of the outputs for stacks whose last matrix begins at 2**31 elements or beyond.

    Yield none if no argument is a stack of at least three matrices, or if the stacks do not fit the memory. With two
    matrices, the distance itself would not fit 32 bits. Only dtypes of 16 bits are tried; a stack then takes 4 GiB of
    addresses.
    """
    stacks = {
        name: one
        for name, one in subject.arguments.items()
        if isinstance(one, Tensor) and one.dim() == 3 and len(one) > 2 and one.element_size() == 2
        if name not in subject.operation.inputs and name != "mask"  # a batch is never so far apart
    }
    distant = {name: _distant(one) for name, one in stacks.items()}
    if not distant or None in distant.values():
        return
    plain = {name: t.detach().clone() for name, t in subject.call().items()}
    with torch.no_grad():
        seen = subject.operation.named(subject.function(**(cloned(subject.arguments) | distant)))
    yield operation_call.judge_form(OperationForm.DISTANT, subject, seen, plain, case)


def _distant(stack: Tensor) -> Tensor | None:
    """Return a copy of a stack (K, M, N) whose last matrix begins at `_OFFSET` or beyond.

    Return None if there is no memory for it.
    """
    step = -(-_OFFSET // (len(stack) - 1))
    size = ((len(stack) - 1) * step + stack[0].numel()) * stack.element_size()
    if stack.device.type == "cuda" and 2 * size > torch.cuda.mem_get_info(stack.device)[0]:
        return None
    try:
        storage = torch.UntypedStorage(size, device=stack.device)
    except RuntimeError:  # no such range of addresses
        return None
    copy = stack.new_empty(0).set_(storage, 0, stack.shape, (step, stack.shape[2], 1))
    return copy.copy_(stack)
