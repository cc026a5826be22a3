"""Encode and decode NF4, with and without double quantisation (arXiv:2305.14314).

Each block of consecutive values shares one scale: absmax, the block's largest magnitude. A value is stored as a 4-bit
code, the index of the level nearest to value / absmax. A packed byte holds the codes of two values.

Triton encodes and decodes on a GPU, and C++ on a CPU. Where C++ cannot run, torch gives the same bits, in pieces that
fit the cache. For encoding, torch divides the axis from -1 to 1 into cells with at most one midpoint between two levels.
Each value is compared with the midpoint of its cell. For decoding, one table look-up per byte returns two values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.kernels.cpp import nf4 as cpp
from harness.kernels.device import TRITON_DTYPES, by_triton
from harness.kernels.dynamic_map_format import dynamic_map
from harness.kernels.nf4_format import ZERO, check_second_sizes, check_sizes, levels
from harness.kernels.real_tensors import real_tensors
from harness.kernels.torch.support.chunks import for_each, size
from harness.kernels.torch.support.huge_pages import empty

_CELLS = 32
"""Number of cells per unit of the axis, for encoding. Multiplication by a power of two is exact."""


@cache
def _words(device: torch.device) -> Tensor:
    """Return the table for decoding, int64 (256,). Entry i holds the two levels of the codes in byte i, as float32."""
    with real_tensors():
        byte = torch.arange(256, device="cpu")
        return torch.stack([levels()[byte >> 4], levels()[byte & 15]], dim=1).view(torch.int64).flatten().to(device)


@cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tables (lower, border) for encoding, with one entry for each cell of the axis from -1 to 1.

    Cell i reaches from i / 32 - 1 to (i + 1) / 32 - 1. lower: the code at the cell's lower end (uint8). border: the
    first midpoint above the lower end (float32). Levels are at least 0.079 apart, so a cell has at most one midpoint.
    Rounding may move a value near a cell's end into the neighbouring cell. The value gets the right code there, too,
    because no midpoint is within 2^-12 of a cell's end. The last cell is for NaN, which gets the highest code.
    """
    with real_tensors():
        midpoints = (levels()[:-1] + levels()[1:]) / 2
        ends = torch.arange(2 * _CELLS + 2, device="cpu") / _CELLS - 1
        lower = torch.bucketize(ends, midpoints)
        border = torch.cat([midpoints, torch.tensor([torch.inf], device="cpu")])[lower]
        return lower.to(device, torch.uint8), border.to(device)


def quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise W to NF4, and return (packed, absmax).

    W: n values of any shape and floating dtype, read as float32. packed: uint8 (ceil(n / 2),). The first value of a
    pair has the high four bits. absmax: float32 (ceil(n / block),).

    Blocks are consecutive in W.flatten() and may cross rows. The last block may be short. A value midway between two
    levels gets the lower level. A block of zeros has absmax 0 and the code of 0. A block with a NaN has absmax NaN. A
    block with an infinity but no NaN has absmax infinity. Raises ValueError for a block below 1 or an integer W.
    """
    if block < 1 or not W.is_floating_point():
        raise ValueError(f"NF4 needs a block of at least 1 and a floating dtype, got {block} and {W.dtype}")
    if by_triton(W) and triton_block(block):
        from harness.kernels.triton import nf4 as gpu

        return gpu.quantize(W, block)
    flat = W.detach().reshape(-1)
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=W.device)
    absmax = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=W.device)
    if cpp.encode(flat, packed, absmax, block):
        return packed, absmax
    step = _step(block, flat.numel(), W.device)
    parts = flat.split(step), packed.split(step // 2), absmax.split(step // block)
    for_each(_encode, [(*piece, block) for piece in zip(*parts, strict=True)], flat.numel())
    if flat.numel() % 2:
        packed[-1] = packed[-1] & 0xF0 | ZERO  # pad with the code of zero, also in a block with a NaN
    return packed, absmax


def _encode(values: Tensor, packed: Tensor, absmax: Tensor, block: int) -> None:
    """Write the codes of `values` to `packed`, and the absmax of each block to `absmax`.

    The last block may be short.
    """
    rest = -values.numel() % (2 * block)
    blocks = (pad(values, (0, rest)) if rest else values).float().view(-1, block)
    largest = blocks.abs().amax(dim=1)
    scaled = (blocks / torch.where(largest == 0, 1.0, largest)[:, None]).view(-1)
    lower, border = _cells(values.device)
    cell = torch.add(_CELLS, scaled, alpha=_CELLS).nan_to_num_(nan=2.0 * _CELLS + 1).to(torch.int32)
    codes = lower.index_select(0, cell)
    codes += (scaled > border.index_select(0, cell)).view(torch.uint8)
    pairs = codes.view(torch.int16)  # two codes per number, the first one in the lower byte
    packed.copy_((pairs << 4 | pairs >> 8)[: packed.numel()])
    absmax.copy_(largest[: absmax.numel()])


def dequantize(
    packed: Tensor, absmax: Tensor, block: int, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return the decoded values in the given shape and dtype: level x absmax, computed in float32 and then cast.

    packed, absmax: as returned by `quantize`. out: None, or contiguous memory for the result, with the number of
    elements of `shape` and this dtype. Raises ValueError if the length of `packed` or `absmax` does not fit `shape`.
    """
    check_sizes(packed, absmax, block, shape)
    if by_triton(packed, absmax) and dtype in TRITON_DTYPES and triton_block(block):
        from harness.kernels.triton import nf4 as gpu

        return gpu.dequantize(packed, absmax, block, shape, dtype, out)
    values = _result(shape, dtype, packed.device, out)
    flat, scale = packed.detach().reshape(-1), absmax.detach().float().reshape(-1)
    if cpp.decode(flat, (scale, None, None, 1), values, block):
        return values
    count = prod(shape)
    step = _step(block, count, packed.device)
    parts = flat.split(step // 2), scale.split(step // block), values.view(-1).split(step)
    table = _words(packed.device)
    for_each(_decode, [(table, *piece, block) for piece in zip(*parts, strict=True)], count)
    return values


def _result(shape: Sequence[int], dtype: torch.dtype, device: torch.device, out: Tensor | None) -> Tensor:
    return empty(shape, dtype, device) if out is None else out.view(tuple(shape))


def _decode(table: Tensor, packed: Tensor, absmax: Tensor, out: Tensor, block: int) -> None:
    """Decode consecutive blocks into `out`. The last block may be short. table: the result of `_words`."""
    pairs = table.index_select(0, packed.to(torch.int32)).view(torch.float32)
    _times_absmax(pairs[: out.numel()], absmax, block, out)


def double_quantize(absmax: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise absmax to 8 bits, and return (codes, absmax2, offset).

    absmax: n float32 numbers of any shape, n > 0. codes: uint8 (n,). absmax2: float32 (ceil(n / block),). offset: the
    mean of absmax, float32 (0-d).

    The mean is subtracted. Each block of differences is then divided by its largest magnitude, absmax2. A code stands
    for the nearest value of the signed dynamic map, and for the lower one in a tie. A NaN or an infinity in absmax
    changes every result, because it changes the mean. Raises ValueError for an empty absmax or a block below 1.
    """
    if block < 1 or not absmax.numel():
        raise ValueError(f"needs at least one absmax, and a block of at least 1, got {absmax.numel()} and {block}")
    flat = absmax.detach().reshape(-1).float()
    offset = flat.mean()
    blocks = pad(flat - offset, (0, -flat.numel() % block)).view(-1, block)
    absmax2 = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax2 == 0, 1.0, absmax2)[:, None]
    code = dynamic_map(flat.device)
    codes = torch.bucketize(scaled.view(-1)[: flat.numel()], (code[:-1] + code[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8), absmax2, offset


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> Tensor:
    """Return the absmax that `double_quantize` encoded, float32, in one dimension.

    Each number is the value of its code x the absmax2 of its block + offset. Raises ValueError if the length of absmax2
    does not fit `codes`, or if offset is not one number.
    """
    check_second_sizes(codes, absmax2, offset, block)
    constants = _flat(codes, absmax2, offset, block)
    absmax = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    if not cpp.decode_constants(constants, absmax):
        torch.index_select(dynamic_map(codes.device), 0, codes.detach().reshape(-1).to(torch.int32), out=absmax)
        _times_absmax(absmax, constants[1], block, absmax)
        absmax += constants[2]
    return absmax


def _flat(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the constants of double quantisation as the C++ kernels take them."""
    return codes.detach().reshape(-1), absmax2.detach().float().reshape(-1), offset.detach().float(), block


def dequantize_double(
    packed: Tensor,
    codes: Tensor,
    absmax2: Tensor,
    offset: Tensor,
    block: int,
    block2: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a weight whose absmax is stored in 8 bits (arXiv:2305.14314, eq. 6).

    packed, block, shape, dtype, out and the result: as in `dequantize`. codes, absmax2, offset: as returned by
    `double_quantize` with the block size `block2`. Raises ValueError as `dequantize` and `double_dequantize` do.
    """
    if by_triton(packed, absmax2) and dtype in TRITON_DTYPES and triton_block(block):
        from harness.kernels.triton import nf4 as gpu

        code = dynamic_map(packed.device)
        return gpu.dequantize_double(packed, codes, absmax2, offset, code, block, block2, shape, dtype, out)
    check_second_sizes(codes, absmax2, offset, block2)
    check_sizes(packed, codes, block, shape)
    values = _result(shape, dtype, packed.device, out)
    if cpp.decode(packed.detach().reshape(-1), _flat(codes, absmax2, offset, block2), values, block):
        return values
    return dequantize(packed, double_dequantize(codes, absmax2, offset, block2), block, shape, dtype, values)


def _times_absmax(values: Tensor, absmax: Tensor, block: int, out: Tensor) -> None:
    """Multiply each block of `values` by its absmax in float32, and write the products to `out` in its dtype."""
    blocks, rest = divmod(values.numel(), block)
    if not rest:
        torch.mul(values.view(-1, block), absmax[:, None], out=out.view(-1, block))
        return
    whole = blocks * block
    torch.mul(values[:whole].view(-1, block), absmax[:blocks, None], out=out[:whole].view(-1, block))
    torch.mul(values[whole:], absmax[blocks], out=out[whole:])


def _step(block: int, values: int, device: torch.device) -> int:
    """Return how many values to encode or decode at a time: an even number of blocks, so that no byte is split."""
    return 2 * block * max(1, -(-size(values, device) // (2 * block)))


def triton_block(block: int) -> bool:
    """Return whether the Triton kernels support this block size: a power of two of at least 32."""
    return block >= 32 and block & (block - 1) == 0
