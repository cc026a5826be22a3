"""nf4_quantize: quantises a tensor in blocks to NF4, two codes per byte, and returns the absmax of every block too."""

from __future__ import annotations

from harness.conformance.comparison.quantised_codes import FourBit
from harness.conformance.operation import Operation
from reference.operations import nf4

_FORM = FourBit(nf4)

OPERATION = Operation(
    name="nf4_quantize",
    outputs=("packed", "absmax"),
    arguments=_FORM.arguments,
    reference=_FORM.quantize,
    judge=_FORM.judge,
)
