"""Faults of a base in NF4, under the reference's LoRA."""

from __future__ import annotations

from harness.conformance.faults import planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"values": {"rank": 3, "alpha": 8.0}, "inputs": 64, "outputs": 128}


@planted("nf4", "codes", **_USUAL)
def puts_the_first_code_into_the_low_nibble(its: PatchedCopy) -> None:
    its.line("return padded[0::2] << 4 | padded[1::2]", "return padded[1::2] << 4 | padded[0::2]")


@planted("nf4", "codes", **_USUAL)
def shares_an_absmax_between_two_blocks(its: PatchedCopy) -> None:
    its.line("quantize_blockwise(W, codebook(), block)", "_halved(*quantize_blockwise(W, codebook(), 2 * block))")
    its.line(
        "def near_tie(", "def _halved(codes, absmax):\n    return codes, absmax.repeat_interleave(2)\n\n\ndef near_tie("
    )


@planted("nf4", "codes", **_USUAL)
def has_the_absmax_of_the_block_before(its: PatchedCopy) -> None:
    its.line("quantize_blockwise(W, codebook(), block)", "_rolled(*quantize_blockwise(W, codebook(), block))")
    its.line("def near_tie(", "def _rolled(codes, absmax):\n    return codes, absmax.roll(1)\n\n\ndef near_tie(")


@planted("nf4", "forward", **_USUAL)
def decodes_with_a_symmetric_codebook(its: PatchedCopy) -> None:
    its.line(
        "dequantize_blockwise(codes, absmax, codebook(), block)",
        "dequantize_blockwise(codes, absmax, torch.linspace(-1, 1, 16), block)",
    )


@planted("nf4-dq", "codes", **_USUAL)
def quantises_the_constants_with_their_mean(its: PatchedCopy) -> None:
    its.line("quantize_blockwise(flat - offset,", "quantize_blockwise(flat + 0 * offset,", file="double_quant")
    its.line(" + offset.float()", "", file="double_quant")


@planted("nf4-dq", "codes", **_USUAL)
def decodes_the_constants_without_their_mean(its: PatchedCopy) -> None:
    its.line(" + offset.float()", "", file="double_quant")


@planted("nf4-dq", "codes", **_USUAL)
def is_one_code_off_after_all(its: PatchedCopy) -> None:
    its.line(
        "return codes, constants, offset", "return (codes + 1).clamp(max=255), constants, offset", file="double_quant"
    )


@planted("nf4-dq", "forward", **_USUAL)
def decodes_with_a_symmetric_codebook_too(its: PatchedCopy) -> None:
    its.line(
        "dequantize_blockwise(codes, absmax, codebook(), block)",
        "dequantize_blockwise(codes, absmax, torch.linspace(-1, 1, 16), block)",
    )
