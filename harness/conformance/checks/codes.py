"""Whether a packed base holds the codes that the reference quantiser gives."""

from __future__ import annotations

import torch

from harness.conformance.case import Case
from harness.conformance.results import at, judged, skipped
from harness.conformance.subject import Subject
from harness.conformance.tolerance import exact, noise_floor, worst_of
from harness.records import CheckResult
from reference import double_quant, nf4


def check_codes(subject: Subject, case: Case) -> CheckResult:
    """The packed base holds the reference's NF4 codes and absmax of the original weights, and the original biases.

    A code may be one level off only where the element lies within two float32 units of the middle of two levels: there
    dividing by absmax and multiplying by its reciprocal, both in use, may part. In a block of zeros any code with an
    absmax that makes it zero will do: bitsandbytes' back ends differ there.
    Where absmax is quantised too, what it decodes to is what the reference's double quantisation decodes to, up to the
    rounding of the mean that is added back.
    """
    if not subject.packed:
        return skipped(subject, case, "codes", "the base is not quantised")
    found, ties = [], 0
    for path, form in subject.packed.items():
        want = subject.expected_codes[path]
        codes = nf4.unpack(form.data, want.codes.numel())
        tied = want.near_tie & ((codes.int() - want.codes.int()).abs() == 1)
        ties += int(tied.sum())
        zero = (want.absmax == 0) & (form.absmax.abs() <= torch.finfo(torch.float32).tiny)
        excused = tied | zero.repeat_interleave(form.block)[: codes.numel()]
        have = {"codes": torch.where(excused, want.codes, codes)}
        expected = {"codes": want.codes}
        if form.double:
            twice = {"absmax": double_quant.dequantize(*double_quant.quantize(want.absmax))}
            found.append(at(path, noise_floor({"absmax": form.absmax}, twice, twice, "float32")))
        else:
            have["absmax"] = torch.where(zero, want.absmax, form.absmax)
            expected["absmax"] = want.absmax
        if want.bias is not None:
            bias = subject.bases[path].bias
            expected["bias"] = want.bias
            have |= {"bias": bias.detach()} if isinstance(bias, torch.Tensor) else {}
        found.append(at(path, exact(have, expected)))
    return judged(subject, case, "codes", worst_of(found, "exact"), f"{ties} codes on the other side of a tie")
