"""Quantisation in blocks of a flat tensor, the dynamic 8-bit map (arXiv:2110.02861), and double quantisation."""

import torch
from torch import Tensor
from torch.nn import functional


def blocks_of(flat: Tensor, block: int) -> Tensor:
    """Return a flat tensor as rows of one block each. Zeros fill the last row."""
    return functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)


def divide_blocks(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the elements divided by the absmax of their block, and the absmax. A block of zeros stays as it is."""
    rows = blocks_of(flat, block)
    absmax = rows.abs().amax(dim=1)
    ratios = rows / torch.where(absmax == 0, 1, absmax)[:, None]
    return ratios.flatten()[: len(flat)], absmax


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest of ascending levels; of two that are equally near, the lower."""
    middles = ((levels[:-1].double() + levels[1:].double()) / 2).to(values.dtype)
    return torch.bucketize(values.nan_to_num(0.0).contiguous(), middles).to(torch.uint8)


def decode_blocks(levels: Tensor, codes: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Return the level of every code times the absmax of its block, flat."""
    return levels[codes.flatten().long()] * absmax.flatten().repeat_interleave(block)[: codes.numel()]


def dynamic_map(signed: bool, device: torch.device | None = None) -> Tensor:
    """Return the 256 values of the dynamic map in ascending order, as float32."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        cells = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.to(device)


@torch.no_grad()
def dynamic_quantize(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes of a tensor of any shape, and the absmax of every block."""
    return encode_dynamic(x.flatten(), signed, block)


@torch.no_grad()
def encode_dynamic(flat: Tensor, signed: bool, block: int) -> tuple[Tensor, Tensor]:
    """Return the codes of a flat tensor in the dynamic map, and the absmax of every block."""
    ratios, absmax = divide_blocks(flat.float(), block)
    return nearest(ratios, dynamic_map(signed, flat.device)), absmax


def decode_dynamic(codes: Tensor, absmax: Tensor, signed: bool, block: int) -> Tensor:
    """Return the decoded elements, flat in float32."""
    return decode_blocks(dynamic_map(signed, codes.device), codes, absmax, block)


@torch.no_grad()
def double_quantize(absmax: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return 8-bit codes of the block constants less their mean, one constant per block of codes, and the mean."""
    offset = absmax.mean()
    return *encode_dynamic(absmax - offset, True, block), offset


@torch.no_grad()
def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> Tensor:
    """Return the decoded block constants."""
    return decode_dynamic(codes, absmax2, True, block) + offset
