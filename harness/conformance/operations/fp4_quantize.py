"""fp4_quantize: quantises a tensor in blocks to FP4, two codes per byte, and returns the absmax of every block too."""

from __future__ import annotations

from harness.conformance.comparison.quantised_codes import FourBit
from harness.conformance.operation import Operation
from reference.operations import fp4

_FORM = FourBit(fp4)

OPERATION = Operation(
    name="fp4_quantize",
    outputs=("packed", "absmax"),
    arguments=_FORM.arguments,
    reference=_FORM.quantize,
    judge=_FORM.judge,
)
