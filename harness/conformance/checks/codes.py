"""Checks of the NF4 codes of a packed (4-bit) weight.

NF4 stores a block of elements as 4-bit codes, which are indices of 16 levels, and as absmax, the block's largest
magnitude.
"""

from __future__ import annotations

from typing import Any

from harness.conformance.case import Case
from harness.conformance.checks import CellStage, States, check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.packed_codes import judge
from harness.conformance.comparison.tolerance_policies import worst_of
from harness.conformance.subject import DTYPES, ExpectedCodes, PackedLayer, Subject
from harness.records.record import CheckResult


@check(in_cell=[CellStage.START])
def check_codes(subject: Subject, case: Case) -> CheckResult:
    """The packed base holds the reference's NF4 codes and absmax of the original weights, and the original biases.

    Exactly the adapted layers are packed. A code may be one level off only where the element lies within two float32
    units of the middle of two levels. Libraries divide by absmax or multiply by its reciprocal, which may differ there.
    A block of zeros may have any codes and any absmax that decode to zero, since bitsandbytes' back ends differ.

    If absmax is quantised too, its decoded values must equal the reference's decoded values, up to the rounding of the
    mean that decoding adds. The codes of a large model are judged in pieces while its layers are packed.
    """
    wanted = subject.expected_codes.keys() | subject.judged_codes.keys()
    if not wanted:
        return skipped(subject, case, "codes", "the base is not quantised")
    odd = [f"{path} is not packed" for path in sorted(wanted - subject.packed.keys())]
    odd += [f"{path} should not be packed" for path in sorted(subject.packed.keys() - wanted)]
    if odd:
        return from_problems(subject, case, "codes", odd)
    found, ties = [], 0
    for path, form in subject.packed.items():
        bias = getattr(subject.bases[path], "bias", None)
        verdict, tied = subject.judged_codes.get(path) or judge(form, subject.expected_codes[path], bias)
        ties += tied
        found.append(prefix_tensor(path, verdict))
    return judged(subject, case, "codes", worst_of(found, "exact"), f"{ties} codes on the other side of a tie")


@check(States.INIT)
def check_packing(subject: Subject, case: Case) -> CheckResult:
    """QLoRA's `state()` has the reference's NF4 codes and absmax of the original weight.

    The rules are those of the check `codes`. In all other checks, the reference computes with the codes in `state()`.
    If there are none, it computes with its own codes, and this check cannot judge the implementation's codes.
    """
    found = []
    block, double = subject.config.block, subject.config.double_quant
    for path in subject.bases:
        layer: Any = subject.reference(path, subject.dtype).layer  # with the subject's codes
        dense: Any = subject.dense_base(path, DTYPES[subject.dtype])
        for name, packed in layer.packed_weights().items():
            want = ExpectedCodes.of(dense.get_parameter(name), block)
            verdict, _ = judge(PackedLayer(packed.codes, packed.constants(), block, double), want, None)
            found.append(prefix_tensor(f"{path}.{name}", verdict))
    return judged(subject, case, "packing", worst_of(found, "exact"))
