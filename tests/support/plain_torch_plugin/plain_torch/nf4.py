"""4-bit codes in blocks: NF4 (QLoRA, arXiv:2305.14314) and FP4 of bitsandbytes."""

import torch
from torch import Tensor

from plain_torch.blockwise import decode_blocks, divide_blocks, nearest

# The published levels, in the order of the codes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Code 8 more than another is its negative.
FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)


def nf4_levels(device: torch.device) -> Tensor:
    """Return the 16 levels of NF4 in ascending order."""
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def pack(codes: Tensor, fill: int) -> Tensor:
    """Return bytes of two codes each, the first in the high four bits. The code `fill` completes an odd number."""
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_full((1,), fill)])
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """Return the first codes of packed bytes."""
    packed = packed.flatten()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]


def nf4_codes(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return one code per element, and the absmax of every block."""
    ratios, absmax = divide_blocks(W.detach().float().flatten(), block)
    return nearest(ratios, nf4_levels(W.device)), absmax


@torch.no_grad()
def nf4_quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the packed codes of a tensor and the absmax of every block."""
    codes, absmax = nf4_codes(W, block)
    return pack(codes, fill=7), absmax


@torch.no_grad()
def nf4_dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return level times absmax, formed in float32 and rounded to `dtype`."""
    codes = unpack(packed, torch.Size(shape).numel())
    return decode_blocks(nf4_levels(packed.device), codes, absmax, block).reshape(tuple(shape)).to(dtype)


def fp4_levels(device: torch.device) -> Tensor:
    """Return the 16 values of FP4 in the order of the codes."""
    half = torch.tensor(FP4, dtype=torch.float32, device=device)
    return torch.cat([half, -half])


@torch.no_grad()
def fp4_quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the packed codes of a tensor and the absmax of every block."""
    ratios, absmax = divide_blocks(W.float().flatten(), block)
    half, order = torch.sort(fp4_levels(W.device)[:8])
    codes = order.to(torch.uint8)[nearest(ratios.abs(), half).long()]
    return pack(codes + 8 * (ratios < 0).to(torch.uint8), fill=0), absmax


@torch.no_grad()
def fp4_dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return value times absmax, formed in float32 and rounded to `dtype`."""
    codes = unpack(packed, torch.Size(shape).numel())
    return decode_blocks(fp4_levels(packed.device), codes, absmax, block).reshape(tuple(shape)).to(dtype)
