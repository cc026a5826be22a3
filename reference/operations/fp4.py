"""FP4: a 4-bit float of sign, two exponent bits and one mantissa bit, scaled block by block. An Operation, not a Method.

Blocks, absmax and packing are those of NF4 (nf4.py). The bits of a code are s e e m: bit 3 is the sign, bits 2 and 1 are the
exponent field E, and bit 0 is the mantissa m. The magnitude of a code is (1 + m / 2) 2^(4 - E), or m / 16 if E is 0. All
magnitudes are divided by the largest one, 12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.operations.dynamic_map import dequantize_blockwise, quantize_blockwise
from reference.operations.nf4 import near_tie as _near_tie
from reference.operations.nf4 import pack_pairs
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="none: bitsandbytes' format; QLoRA (arXiv:2305.14314v1, table 2) compares NF4 with a 4-bit float, E2M1",
    deviations=(
        Deviation(
            topic="format",
            paper="QLoRA's table 2: E2M1, which in the usual reading has magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 6 (over "
            "6)",
            here="0, 1/16, 2, 3, 4, 6, 8, 12 over 12, and a larger exponent field means a smaller number",
            why="this is bitsandbytes' table; only its smallest magnitude differs, a sixteenth of E2M1's",
        ),
        Deviation(
            topic="sign of zero, and of a tie",
            paper="not in a paper",
            here="sign and magnitude are separate: a tie takes the smaller magnitude; a negative number that rounds "
            "to zero gets code 8",
            why="bitsandbytes' CUDA and Triton kernels do the same; its CPU code sorts both zeros into one table, so "
            "that a negative tie takes the larger magnitude, and code 8 stands for a small positive number, code 0 "
            "for a small negative one (with the same values)",
        ),
        Deviation(
            topic="midpoints",
            paper="not in a paper",
            here="half the sum of neighbours, in float32",
            why="bitsandbytes' Triton kernel has them as decimals of six or seven digits (0.583333 for 0.5833334)",
        ),
    ),
)
_SIGN = 8


def codebook() -> Tensor:
    """Return the 16 values in the order of their codes, as float32. Code 8 is minus zero."""
    E, m = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (4, 2)), indexing="ij")
    magnitudes = torch.where(E == 0, m / 16, (1 + m / 2) * 2 ** (4 - E)).flatten()
    magnitudes = magnitudes / magnitudes.max()
    return torch.cat([magnitudes, -magnitudes])


def quantize(W: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax). codes: uint8 from 0 to 15, in the order of W.flatten(). absmax: one float32 per block.

    W: any shape and floating dtype, read as float32. A magnitude exactly between two values takes the smaller one. A
    block of zeros has absmax 0 and codes 0. If a block holds a NaN or an infinity, none of its elements is decoded to a
    finite value. Raises ValueError if `block` is below 1.
    """
    magnitudes, order = codebook()[:_SIGN].sort()
    flat = W.detach().flatten().float()
    ranks, absmax = quantize_blockwise(flat.abs(), magnitudes, block)
    # Where absmax is infinite or NaN, the quotient is 0, minus 0 or NaN, so no element counts as negative.
    negative = (flat < 0) & absmax.isfinite().repeat_interleave(block)[: flat.numel()]
    return order.to(W.device)[ranks.long()].to(torch.uint8) + _SIGN * negative.to(torch.uint8), absmax


def near_tie(W: Tensor, block: int = 64) -> Tensor:
    """Return a flat mask: True where an element is so near a midpoint of two values that rounding may decide its code."""
    return _near_tie(W.abs(), block, codebook()[:_SIGN].sort().values)


def dequantize(codes: Tensor, absmax: Tensor, block: int = 64) -> Tensor:
    """Return the decoded elements, each the value of its code times the absmax of its block. They are flat float32."""
    return dequantize_blockwise(codes, absmax, codebook(), block)


def pack(codes: Tensor) -> Tensor:
    """Return bytes (uint8) of two codes each. The first code is in the high 4 bits.

    If the number of codes is odd, the code of zero is added. `nf4.unpack` is the inverse.
    """
    return pack_pairs(codes, fill=0)
