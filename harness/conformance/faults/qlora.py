"""Faults of QLoRA."""

from __future__ import annotations

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL, inputs=64, outputs=48)


@planted("qlora", "forward", values=_USUAL, inputs=64, outputs=48)
def swaps_the_nibbles_when_decoding(its: PatchedCopy) -> None:
    its.line("nf4.unpack(self.codes, E * D)", "nf4.unpack(self.codes >> 4 | self.codes << 4, E * D)")


@planted("qlora", "forward", values=_USUAL, inputs=64, outputs=48)
def forgets_the_offset(its: PatchedCopy) -> None:
    its.line(
        "double_quant.dequantize(self.absmax, self.absmax2, self.offset)",
        "double_quant.dequantize(self.absmax, self.absmax2, 0 * self.offset)",
    )


@planted("qlora", "forward", values={**_USUAL, "double_quant": False}, inputs=64, outputs=48)
def takes_the_absmax_of_the_next_block(its: PatchedCopy) -> None:
    its.line("        absmax = self.absmax\n", "        absmax = self.absmax.roll(1)\n")


@planted("qlora", "forward", values=_USUAL, inputs=64, outputs=48)
def forgets_the_scaling(its: PatchedCopy) -> None:
    its.line(
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias) + self.scaling * (",
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias) + (",
    )


@planted("qlora", "forward", values=_USUAL, inputs=64, outputs=48)
def runs_on_the_original_weight_in_full_precision(its: PatchedCopy) -> None:
    its.line("linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias)", "self.base(x_TD)")


@planted("qlora", "merge", values=_USUAL, inputs=64, outputs=48)
def merges_into_the_original(its: PatchedCopy) -> None:
    its.line(
        "dense.weight.copy_(self.weight().to(dense.weight.dtype) + self.delta()",
        "dense.weight.copy_(dense.weight + self.delta()",
    )
