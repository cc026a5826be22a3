"""Check of the codes of a packed base."""

from __future__ import annotations

import torch

from harness.conformance.case import Case
from harness.conformance.checks import CellStage, check
from harness.conformance.comparison.check_results import judged, prefix_tensor, skipped
from harness.conformance.comparison.packed_codes import judge
from harness.conformance.comparison.tolerance_policies import worst_of
from harness.conformance.subject import Subject
from harness.records.record import CheckResult


@check(in_cell=[CellStage.START])
def check_codes(subject: Subject, case: Case) -> CheckResult:
    """The packed base holds the reference's NF4 codes and absmax of the original weights, and the original biases.

    A code may be one level off only where the element lies within two float32 units of the middle of two levels.
    Libraries divide by absmax or multiply by its reciprocal, which may differ there. A block of zeros may have any
    codes and any absmax that decode to zero, since bitsandbytes' back ends differ.

    If absmax is quantised too, its decoded values must equal those of the reference's double quantisation, up to the
    rounding of the mean that is added back. The codes of a large model are judged in pieces, as each layer is packed.
    """
    if not subject.packed:
        return skipped(subject, case, "codes", "the base is not quantised")
    found, ties = [], 0
    for path, form in subject.packed.items():
        verdict, tied = subject.judged_codes.get(path) or judge(
            form, subject.expected_codes[path], _bias(subject, path)
        )
        ties += tied
        found.append(prefix_tensor(path, verdict))
    return judged(subject, case, "codes", worst_of(found, "exact"), f"{ties} codes on the other side of a tie")


def _bias(subject: Subject, path: str) -> torch.Tensor | None:
    bias = subject.bases[path].bias
    return bias if isinstance(bias, torch.Tensor) else None
