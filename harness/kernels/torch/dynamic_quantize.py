"""Blockwise 8-bit codes of the dynamic map (arXiv:2110.02861, section 2), found exactly by two table look-ups.

The upper half of a float32 (sign, exponent and seven bits of the fraction) selects one of 65,536 buckets. A bucket
contains at most one midpoint between neighbouring values of the map. A table gives the number of midpoints below the
bucket. One comparison with the next midpoint then decides the code. A binary search would take eight dependent steps,
and thirty times as long on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from harness.kernels.device import by_triton
from harness.kernels.dynamic_map_format import dynamic_map

CHUNK = 1 << 15
"""Number of elements processed at a time on a CPU.

Temporaries of this size fit the CPU's cache, and torch starts no threads for them.
"""


class Tables(NamedTuple):
    """Look-up tables of the dynamic map."""

    values: Tensor
    """Values of the map: float32 (256,), ascending."""
    midpoints: Tensor
    """Midpoints between neighbouring values: float32 (256,). The last one is infinite."""
    below: Tensor
    """Number of midpoints below each bucket: uint8 (65536,)."""


@cache
def tables(device: torch.device, signed: bool) -> Tables:
    """Return the tables of the signed or of the unsigned map on this device. The result is cached."""
    with torch.inference_mode(False):
        values = dynamic_map(torch.device("cpu"), signed)
        midpoints = (values[:-1] + values[1:]) / 2
        upper = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16
        # The lowest number of a negative bucket is the one of largest magnitude.
        lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
        below = torch.bucketize(lowest, midpoints).to(torch.uint8)
        padded = torch.nn.functional.pad(midpoints, (0, 1), value=torch.inf)
        return Tables(values.to(device), padded.to(device), below.to(device))


def nearest(relative: Tensor, of: Tables) -> Tensor:
    """Return the uint8 code of the map's nearest value for each number in `relative`. Ties go to the lower value.

    relative: float32, contiguous, 1-d. of: tables of the map.
    """
    bucket = (relative.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    codes = of.below.index_select(0, bucket)
    return codes.add_(relative > of.midpoints.index_select(0, codes.int()))


def decode(codes: Tensor, absmax: Tensor, block: int, of: Tables) -> Tensor:
    """Return the decoded numbers, float32, 1-d: the map's value for each code x the absmax of the code's block.

    codes: uint8, 1-d. absmax: one number per block of `block` codes. of: tables of the map.
    """
    decoded = of.values.index_select(0, codes.int())
    whole = len(decoded) // block * block
    decoded[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    if whole < len(decoded):
        decoded[whole:] *= absmax[-1]
    return decoded


def encode(x: Tensor, block: int, of: Tables) -> tuple[Tensor, Tensor]:
    """Return the codes of x (uint8) and the absmax of each block (float32).

    x: float32, contiguous, 1-d. block: elements per block. of: tables of the map. A block of zeros has absmax 0 and the
    code of 0.
    """
    rows = torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)
    absmax = rows.abs().amax(dim=1)
    divisor = torch.where(absmax == 0, 1.0, absmax)
    return nearest((rows / divisor[:, None]).flatten(), of)[: len(x)], absmax


def dynamic_quantize(x: Tensor, block: int = 256, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax). codes: uint8, in the order of x.flatten(). absmax: float32, one per block.

    x: any shape and floating dtype, read as float32. block: elements per block; the last block may be short. signed:
    False for the map without negative values. The code of an element stands for the value of the map that is nearest to
    element / absmax. A tie goes to the lower value. If a block has a NaN or an infinity, so has its absmax. Raises
    ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if by_triton(x):
        from harness.kernels.triton import dynamic_quantize as gpu

        return gpu.dynamic_quantize(x, block, signed)
    flat, of = x.detach().flatten(), tables(x.device, signed)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=x.device)
    step = max(1, CHUNK // block) * block if x.device.type == "cpu" else max(1, flat.numel())
    for first in range(0, flat.numel(), step):
        part = slice(first, first + step)
        blocks = slice(first // block, -(-min(first + step, flat.numel()) // block))
        codes[part], absmax[blocks] = encode(flat[part].float(), block, of)
    return codes, absmax
