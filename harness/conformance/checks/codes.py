"""Checks of the codes of a packed weight.

NF4 stores a block of elements as 4-bit codes, which are indices of 16 levels, and as absmax, the block's largest
magnitude. The 8-bit format stores a row of elements as codes from -127 to 127, and as absmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checks import CellStage, States, check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.packed_codes import judge, judge_rows
from harness.conformance.comparison.tolerance_policies import worst_of
from harness.conformance.subject import DTYPES, ExpectedCodes, PackedLayer, Subject
from harness.records.record import CheckResult
from reference.shared.int8_weight import Int8Weight


@check(in_cell=[CellStage.START], in_brief_cases=True)
def check_codes(subject: Subject, case: Case) -> CheckResult:
    """The packed base holds the reference's NF4 codes and absmax of the original weights, and the original biases.

    Exactly the adapted layers are packed. A code may be one level off only where the element lies within two float32
    units of the middle of two levels. Libraries divide by absmax or multiply by its reciprocal, which may differ there.
    A block of zeros may have any codes and any absmax that decode to zero, since bitsandbytes' back ends differ.

    If absmax is quantised too, its decoded values must equal the reference's decoded values, up to the rounding of the
    mean that decoding adds.
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
    """`state()` has the reference's codes and absmax of the original weight: in NF4 (QLoRA), or in 8 bits (lora_int8).

    The rules are those of the check `codes`, with rows in the place of blocks in 8 bits. In all other checks, the
    reference computes with the codes in `state()`. If there are none, it computes with its own codes, and this check
    cannot judge the implementation's codes. The check fails if the codes take more bytes than those of the reference.
    """
    found = []
    for path in subject.bases:
        reference = subject.reference(path, subject.dtype)  # with the subject's codes
        layer: Any = reference.layer
        if wide := _too_wide(path, subject.state(), reference.adapted.state()):
            return from_problems(subject, case, "packing", wide)
        dense: Any = subject.dense_base(path, DTYPES[subject.dtype])
        for name, packed in layer.packed_weights().items():
            weight = dense.get_parameter(name)
            if isinstance(packed, Int8Weight):
                verdict = judge_rows(packed.codes, packed.absmax, weight)
            else:
                form = PackedLayer(packed.codes, packed.constants(), packed.block, packed.two_levels)
                verdict, _ = judge(form, ExpectedCodes.of(weight, packed.block), None)
            found.append(prefix_tensor(f"{path}.{name}", verdict))
    return judged(subject, case, "packing", worst_of(found, "exact"))


def _too_wide(path: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return a message for each tensor of integer codes in `state` that takes more bytes than the reference's tensor.

    A tensor of another shape is another form of the codes, and is left out. expected: the state of the reference, with the
    name `layer` for the layer at `path`.
    """
    codes = {name.replace("layer", path, 1): t for name, t in expected.items() if not t.is_floating_point()}
    return [
        f"{name} has {state[name].dtype}, which takes more bytes than {t.dtype}"
        for name, t in codes.items()
        if name in state and state[name].shape == t.shape and state[name].element_size() > t.element_size()
    ]
