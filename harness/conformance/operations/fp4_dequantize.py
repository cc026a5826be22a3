"""fp4_dequantize: decodes packed FP4 codes and the absmax of every block to a tensor."""

from __future__ import annotations

from harness.conformance.comparison.quantised_codes import FourBit
from harness.conformance.operation import Operation
from reference.operations import fp4

_FORM = FourBit(fp4)

OPERATION = Operation(
    name="fp4_dequantize",
    outputs=("W",),
    arguments=_FORM.packed_arguments,
    reference=_FORM.dequantize,
    rounded_once=("W",),
)
