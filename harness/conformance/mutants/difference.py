"""Compare a mutant with the original, by digests of their results in random cases.

If no check catches a mutant, the checks may have a gap. Or the mutant is no mistake: for example, it changes only the
size of a buffer. If mutant and original compute the same bits in random cases, the mutant is probably no mistake.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from harness.conformance import parity_suite
from harness.conformance.comparison import operation_call
from harness.conformance.drawing.search import cases
from harness.conformance.execution import suite_run
from harness.conformance.parity_suite import AnyCase, MethodCase, MethodSuite, OperationCase, OperationSuite
from harness.conformance.subject import DTYPES, warm
from harness.conformance.walk.program import RUN_MODES, Program
from harness.methods.registry import Implementation

SEED = 7919
CASES = 24
"""Number of random cases for each Method, Operation or quantised base."""


def digests(implementation: Implementation) -> list[str]:
    """Return one digest per random case. It covers all outputs, gradients, tensors and states, and any exception."""
    plan = parity_suite.load_plan(implementation.target)
    return [digest(implementation, plan, case) for case in cases(plan, implementation.dtypes, CASES, SEED)]


def digest(implementation: Implementation, plan: parity_suite.ParitySuite, case: AnyCase) -> str:
    """Return a digest of the implementation's results in a case."""
    found = hashlib.sha256()
    try:
        for named in _observed(implementation, plan, case):
            for name, value in named.items():
                found.update(name.encode())
                found.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    except Exception as error:  # noqa: BLE001  # that a mutant raises is what the digest must show
        found.update(f"{type(error).__name__}: {error}".encode())
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    whole = tensor.detach().cpu().contiguous()
    return f"{whole.dtype} {tuple(whole.shape)}".encode() + whole.reshape(-1).view(torch.uint8).numpy().tobytes()


def _observed(
    implementation: Implementation, plan: parity_suite.ParitySuite, of: AnyCase
) -> Iterator[Mapping[str, object]]:
    torch.manual_seed(SEED)
    if isinstance(plan, OperationSuite) and isinstance(of, OperationCase):
        subject, case = suite_run.call(implementation, plan, of)
        yield subject.call()
        if subject.operation.differentiable:
            yield operation_call.gradients(subject, subject.function, DTYPES[of.dtype], case)
    elif isinstance(plan, MethodSuite) and isinstance(of, MethodCase):
        yield from _adapter_lifecycle(implementation, plan, of)


def _adapter_lifecycle(
    implementation: Implementation, plan: MethodSuite, of: MethodCase
) -> Iterator[Mapping[str, object]]:
    """Yield tensors and outputs of an adapter at each stage of its life.

    The stages are: attaching, calls with random adapter tensors, training steps, merging, unmerging and detaching.
    """
    subject, case = suite_run.attach(implementation, plan, of)
    if case.forward is None:
        return
    model, adapted = subject.model, subject.adapted
    program = Program(model, adapted, lambda: (model, adapted), case.forward, may_train=True)
    yield dict(adapted.tensors()) | dict(adapted.state())
    warm(subject.added(), case.generator(salt=1))
    for run in RUN_MODES.values():
        yield run(program)
    for step in range(4):
        program.backward(step)
        program.step()
        yield dict(adapted.tensors()) | dict(adapted.state())
    yield {"optimizer": copy.deepcopy(program.optimizer.state_dict())}
    program.set_training(False)
    for change in (adapted.merge, adapted.unmerge, adapted.detach):
        change()
        yield RUN_MODES["no_grad"](program)
