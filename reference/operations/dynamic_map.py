"""The dynamic 8-bit code and blockwise quantisation with it. Dettmers et al., arXiv:2110.02861, section 2. An Operation.

A code of 8 bits stands for one of 256 values in [-1, 1] (signed) or [0, 1] (unsigned). The largest values are spread
evenly over 0.1 .. 1, and each lower decade has half as many values, because its codes spend one more bit on the
exponent. A flattened tensor is split into blocks of consecutive elements. Each block is divided by its largest
magnitude and rounded to the nearest values. 8-bit optimizer states and QLoRA's double quantisation both use this code.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2110.02861v2, sections 1.3, 2.1 and 2.2; table and tie rule as in bitsandbytes",
    deviations=(
        Deviation(
            topic="the data type",
            paper="section 1.3 and figure 2 give the bits and no values",
            here="seven decades, i = 0 .. 6: the middles of 2^i equal cells of 0.1 .. 1, times 10^(i - 6); and 0 and 1",
            why="this is bitsandbytes' create_dynamic_map, bit for bit; it has no -1, so that the lowest element of "
            "a block is decoded to -0.993 of its magnitude",
        ),
        Deviation(
            topic="the sign's bit in the unsigned type",
            paper="section 2.2 uses it as one more bit of the fixed fraction",
            here="2^(i + 1) cells per decade instead of 2^i",
            why="this is equivalent, and bitsandbytes does the same",
        ),
        Deviation(
            topic="search",
            paper="binary search for the nearest value",
            here="the value nearest to x / absmax; an element exactly between two values takes the lower. The middle of "
            "two values is rounded to float32; an implementation may use the exact one",
            why="bitsandbytes multiplies by the reciprocal of absmax, which may move an element across a midpoint "
            "that it almost touches; its CPU kernel rounds to a grid first, which moves more elements (see the "
            "tests)",
        ),
    ),
)


def dynamic_map(signed: bool = True) -> Tensor:
    """Return the 256 values in ascending order, as float32. They span -0.993 .. 1 if signed, else 0 .. 1."""
    return torch.tensor(_values(signed), dtype=torch.float32)


@cache  # of numbers and not of a tensor, which a caller could change
def _values(signed: bool) -> tuple[float, ...]:
    decades = []
    with _disable_current_modes():  # such as FakeTensorMode, whose tensors have no values
        for i in range(7):
            edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
            decades.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
        above = torch.cat(decades)
        below = -above if signed else above[:0]
        return (*below.flip(0).tolist(), 0.0, *above.tolist(), 1.0)


def quantize_blockwise(x: Tensor, code: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax). codes: uint8 indices into `code`, in the order of x.flatten(). absmax: one float32 per block.

    x: any shape and floating dtype, read as float32. code: ascending values. The last block may be short. An element
    exactly between two values takes the lower index. A block of zeros has absmax 0, and its codes are the index of 0.
    If a block holds a NaN or an infinity, this is also its absmax, so that none of its elements is decoded to a finite
    value; its codes may be any. Raises ValueError if `block` is below 1.
    """
    if block < 1:
        raise ValueError(f"a block must hold at least one element, got {block}")
    flat = x.detach().flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = torch.where(absmax[:, None] == 0, torch.zeros_like(blocks), blocks / absmax[:, None])
    midpoints = ((code[:-1] + code[1:]) / 2).to(x.device)
    codes = torch.bucketize(scaled, midpoints)  # counts the midpoints strictly below, so a tie goes down
    return codes.flatten()[: flat.numel()].to(torch.uint8), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, block: int = 256) -> Tensor:
    """Return the decoded elements, code[codes] times the absmax of their block. They are flat float32, one per code."""
    scale = absmax.float().repeat_interleave(block)[: codes.numel()]
    return code.to(codes.device)[codes.flatten().long()] * scale
