"""Check that several forward calls before the first backward pass do not disturb each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.check_results import judged, prefix_tensor, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.layer_comparison import observe_with_reference
from harness.conformance.comparison.observations import preserved_state
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.operation import OperationSubject, cloned
from harness.conformance.subject import DTYPES, Subject
from harness.records.record import CheckResult

_SALTS = (0, 500, 600)
"""Seeds of the random inputs of three calls. Two calls would not reveal a layer that alternates between two buffers."""


@check(States.WARM, depends_on_sizes=False, only_wide=True, also_in_representative_cases=True)
def check_overlap(subject: Subject | OperationSubject, case: Case) -> CheckResult:
    """Calls with inputs of one shape do not disturb each other, even if all run before the first backward pass.

    A layer is called three times with different inputs, and an Operation twice, also under inference_mode. Then the
    backward passes run in the same order. Each call gives what the reference gives for its input. A later call
    changes nothing that an earlier call returned or saved for its backward pass. Two calls of an Operation return no
    memory in common. The gradients of a layer's tensors are added up over its calls, as over several batches. A call
    that is wrong even alone is left to other checks.
    """
    found = list(_of_operation(subject, case) if isinstance(subject, OperationSubject) else _of_layers(subject, case))
    if not found:
        return skipped(subject, case, "overlap", "a single call is wrong already; other checks report it")
    return judged(subject, case, "overlap", worst_of(found, found[0].policy))


def _of_layers(subject: Subject, case: Case) -> Iterator[Judgement]:
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base, dtype, factor = subject.original_base(path), DTYPES[subject.dtype], case.factor("overlap")
        drawn = [inputs(base, case.tokens, dtype, case.generator(salt + index)) for salt in _SALTS]
        x, dy = (torch.stack(every) for every in zip(*drawn, strict=True))
        training = subject.trains_plainly
        verdict = noise_floor(
            *observe_with_reference(subject, path, layer, x, dy, training=training, run=_together),
            subject.dtype,
            factor,
        )
        alone = (
            observe_with_reference(subject, path, layer, x[0], dy[0], training=training) if not verdict.passed else None
        )
        if alone is None or noise_floor(*alone, subject.dtype, factor).passed:
            yield prefix_tensor(path, verdict)


def _together(
    layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor, *, training: bool = False
) -> dict[str, Tensor]:
    """Run `layer` on each item of x, and return the outputs and gradients of all calls.

    The backward passes begin after the last forward pass. The layer's tensors accumulate the gradients of all calls.
    """
    with preserved_state(layer, tensors, training):
        leaves = [one.detach().clone().requires_grad_(one.is_floating_point()) for one in x]
        ys = [layer(leaf) for leaf in leaves]
        for y, one in zip(ys, dy, strict=True):
            if y.requires_grad and y.shape == one.shape:
                y.backward(one)
        seen = {f"y of call {n}": y.detach().clone() for n, y in enumerate(ys, 1)}
        seen |= {f"grad x of call {n}": leaf.grad for n, leaf in enumerate(leaves, 1) if leaf.grad is not None}
        return seen | {f"grad {name}": t.grad for name, t in tensors.items() if t.grad is not None}


def _of_operation(subject: OperationSubject, case: Case) -> Iterator[Judgement]:
    if not all(verdict.passed for verdict, _ in operation_call.judgements(subject, subject.call(), case)):
        return
    both = [subject, replace(subject, arguments=subject.another())]
    outputs = [one.operation.named(one.function(**cloned(one.arguments))) for one in both]
    first, second = ({t.untyped_storage().data_ptr() for t in mine.values() if t.numel()} for mine in outputs)
    # A third call could overwrite these results, even where the first two happen to be equal.
    if first & second:
        yield Judgement(False, None, None, "call 2", "it returns memory that call 1 returned", "exact", 0)
    for number, (one, mine) in enumerate(zip(both, outputs, strict=True), 1):
        yield from (
            prefix_tensor(f"call {number}", verdict) for verdict, _ in operation_call.judgements(one, mine, case)
        )
    try:
        with torch.inference_mode():
            kept = [one.operation.named(one.function(**cloned(one.arguments))) for one in both]
    except Exception as error:  # an implementation may raise anything; only a note is added
        error.add_note("in a call under inference_mode")
        raise
    for number, (one, mine, usual) in enumerate(zip(both, kept, outputs, strict=True), 1):
        yield operation_call.judge_form(f"call {number} under inference_mode", one, mine, usual, case)
    if not subject.operation.differentiable:
        return
    dtype, factor = DTYPES[subject.dtype], case.factor("overlap")
    if not operation_call.judge_gradients(subject, case, factor).passed:
        return
    under_way = [operation_call.forward(one, subject.function, dtype) for one in both]
    gradients = [operation_call.backward(outputs, leaves, case) for outputs, leaves in under_way]
    for number, (one, mine) in enumerate(zip(both, gradients, strict=True), 1):
        yield prefix_tensor(f"call {number}", operation_call.judge_gradients(one, case, factor, mine=mine))
