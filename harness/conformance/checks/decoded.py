"""Check of the decoded weight by which a layer with a packed weight multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.check_results import judged, prefix_tensor, skipped
from harness.conformance.comparison.tolerance_policies import Judgement, rounded_once, worst_of
from harness.conformance.operation import OperationSubject, cloned
from harness.conformance.subject import DTYPES, Subject
from harness.records.record import CheckResult
from reference.shared.layers import device_of

_UNIT_ROWS = 64
"""Largest number of rows of the identity matrix."""


@check(States.INIT, depends_on_sizes=False)
def check_decoded(subject: Subject | OperationSubject, case: Case) -> CheckResult:
    """A packed weight is decoded in float32, and rounded once to the dtype of the input.

    In 16 bits, the check calls the layer on rows of the identity matrix, before the adapter is trained. So every output is
    one number of the decoded weight, and nearly all outputs must be correctly rounded. Layers with a bias are left out.
    `forward` and `outputs` would not notice an absmax that is rounded to 16 bits, because the errors of long sums are
    larger. An Operation is called without bias and mask, and with an A and a B of zeros.
    """
    if subject.dtype not in ("bfloat16", "float16"):
        return skipped(subject, case, "decoded", "the rule is for 16 bits")
    found = list(_of_operation(subject) if isinstance(subject, OperationSubject) else _of_layers(subject))
    if not found:
        return skipped(subject, case, "decoded", "every linear layer has a bias, or the weight is empty")
    return judged(subject, case, "decoded", worst_of(found, found[0].policy))


def _rows(like: Tensor) -> Tensor:
    """Return rows of the identity matrix, with the last dimension, dtype and device of `like`."""
    inputs = like.shape[-1]
    return torch.eye(min(inputs, _UNIT_ROWS), inputs, dtype=like.dtype, device=like.device)


def _of_operation(subject: OperationSubject) -> Iterator[Judgement]:
    given = cloned(subject.arguments)
    if 0 in given["shape"]:
        return
    given |= {"x": _rows(given["x"])} | {name: None for name in ("bias", "mask") if name in given}
    given |= {name: torch.zeros_like(given[name]) for name in ("A", "B") if name in given}
    unit = replace(subject, arguments=given)
    yield rounded_once(unit.call(), operation_call.reference_outputs(unit, torch.float64))


def _of_layers(subject: Subject) -> Iterator[Judgement]:
    """Compare each linear layer without bias with the reference's layer in the same dtype, whose outputs are correctly
    rounded. A bias would be added before or after the rounding.
    """
    for path, layer in subject.adapted.layers.items():
        base = subject.original_base(path)
        if isinstance(base, nn.Linear) and base.bias is None:
            reference = subject.reference(path, subject.dtype).layer
            x = _rows(torch.empty(base.in_features, dtype=DTYPES[subject.dtype], device=device_of(base)))
            with torch.no_grad():
                yield prefix_tensor(path, rounded_once({"y": layer(x)}, {"y": reference(x).double()}))
