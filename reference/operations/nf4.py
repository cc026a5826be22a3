"""NF4: the 4-bit NormalFloat of QLoRA. Dettmers et al., NeurIPS 2023, arXiv:2305.14314. An Operation, not a Method.

A flattened tensor is split into blocks of consecutive elements. Each block is divided by its largest magnitude (absmax,
float32) and rounded to the nearest of 16 levels. Two 4-bit codes share a byte.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from reference.operations.dynamic_map import dequantize_blockwise, quantize_blockwise
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2305.14314v1, appendix E; table, packing and tie rule as in bitsandbytes",
    deviations=(
        Deviation(
            topic="levels",
            paper="eq. 4: q_i = (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1))) / 2",
            here="quantiles from 0.9677083 down to 1/2: eight positive, seven negative, and zero",
            why="eq. 4 starts at Q(0), which is minus infinity, and its finite levels differ from the published "
            "table. torchao's levels have four decimals, and the weight's dtype",
        ),
        Deviation(
            topic="scaling",
            paper="W / absmax",
            here="the same; a block of zeros has absmax 0 and the code of zero",
            why="bitsandbytes multiplies by 1 / absmax, which may decide an element that almost touches a midpoint "
            "(`near_tie`); on the CPU its absmax is at least 1e-38, so that a block of smaller numbers loses its "
            "largest ones too",
        ),
    ),
)


def codebook() -> Tensor:
    """Return the 16 levels in ascending order from -1 to 1, as float32. They are computed, not copied from a table.

    The levels are quantiles of the normal distribution. The outermost probability is 0.9677083 = 1 - (1/30 + 1/32) / 2.
    This is halfway between the outermost probabilities for 15 and for 16 levels. The probabilities are a grid of float32
    numbers and the quantiles float64; in other precisions, the last bits of the levels differ from the published table.
    """
    quantile = NormalDist().inv_cdf

    def half(levels: int) -> list[float]:
        # The probabilities of the published table come from a float32 grid. The same grid gives the same bits.
        grid = torch.linspace(0.9677083, 0.5, levels + 1, dtype=torch.float32)
        return [quantile(p) for p in grid[:-1].tolist()]

    values = torch.tensor([-q for q in half(7)] + [0.0] + half(8)[::-1], dtype=torch.float32)
    return values / values.max()


def quantize(W: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax). codes: uint8 from 0 to 15, in the order of W.flatten(). absmax: one float32 per block.

    W: any shape and floating dtype, read as float32. block: at least 1 (bitsandbytes: 32, 64, 128 ... 4096). Blocks
    cross rows, and the last block may be short. An element exactly between two levels takes the lower one. A block of
    zeros has absmax 0 and the code of zero, 7. If a block holds a NaN or an infinity, this is also its absmax, so that
    none of its elements is decoded to a finite value; its codes may be any.
    """
    return quantize_blockwise(W, codebook(), block)


def near_tie(W: Tensor, block: int = 64, levels: Tensor | None = None) -> Tensor:
    """Return a flat mask: True where an element is so near a midpoint of two levels that rounding may decide its code.

    An implementation may divide by absmax, or multiply by the reciprocal of absmax. The two results differ by up to 1.5
    units in the last place, so that correct implementations may give such an element codes one level apart. If absmax
    is a power of two, both are exact. The mask is then True only where the exact midpoint and the midpoint in float32
    decide differently: where an element equals a midpoint that was rounded up. If absmax exceeds 2^126, its reciprocal
    is subnormal and has two bits fewer. levels: ascending; by default those of NF4.
    """
    flat = W.detach().flatten().float()
    absmax = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block).abs().amax(dim=1)
    of_each = absmax.double().repeat_interleave(block)[: flat.numel()]
    scaled = torch.where(of_each == 0, torch.zeros_like(of_each), flat.double() / of_each)
    levels = codebook() if levels is None else levels
    midpoints = (levels[:-1].double() + levels[1:].double()).to(W.device) / 2
    above = torch.bucketize(scaled, midpoints).clamp(max=len(midpoints) - 1)
    divided = (torch.frexp(absmax).mantissa != 0.5).repeat_interleave(block)[: flat.numel()]
    last_places = torch.where(of_each > 2.0**126, 4, 2)
    near = last_places * torch.finfo(torch.float32).eps * scaled.abs().clamp(max=1)
    mask = torch.zeros_like(divided)
    for middle in (midpoints[above], midpoints[(above - 1).clamp(min=0)]):
        rounded = middle.float().double()
        mask |= (divided & ((scaled - rounded).abs() <= near)) | ((scaled == rounded) & (rounded > middle))
    return mask


def dequantize(codes: Tensor, absmax: Tensor, block: int = 64) -> Tensor:
    """Return the decoded elements, each the level of its code times the absmax of its block. They are flat float32."""
    return dequantize_blockwise(codes, absmax, codebook(), block)


def pack(codes: Tensor) -> Tensor:
    """Return bytes (uint8) of two codes each. The first code is in the high 4 bits.

    If the number of codes is odd, the code of zero is added.
    """
    return pack_pairs(codes, fill=7)


def pack_pairs(codes: Tensor, fill: int) -> Tensor:
    """Return bytes (uint8) of two 4-bit codes each. The first code is in the high 4 bits.

    If the number of codes is odd, the code `fill` is added.
    """
    padded = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=fill)
    return padded[0::2] << 4 | padded[1::2]


def unpack(packed: Tensor, numel: int) -> Tensor:
    """Return the first `numel` codes of `packed`. This is the inverse of `pack`."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:numel]
