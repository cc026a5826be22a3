"""NF4 on a GPU (arXiv:2305.14314): quantise, dequantise, and dequantise double-quantised weights, one launch each.

Each program has a tile of whole blocks. Bytes and values move 128 bits at a time, also at the end of a tensor, because
the masks of loads and stores are constant over 32 values. If the number of values is not a multiple of 32, the last
program masks each value instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.nf4_format import check_second_sizes, check_sizes
from harness.kernels.triton.support.launch import launch
from harness.kernels.triton.support.nf4_levels import ZERO, nearest_code, table
from harness.kernels.triton.support.rounding import load_as_float32, store_as

_THREADS = 128
_TILE, _QUANTIZED_TILE = 64 * _THREADS, 32 * _THREADS
"""Number of values per program when decoding (`_TILE`) and when quantising (`_QUANTIZED_TILE`).

When decoding, a thread makes two loads of 128 bits. Quantising takes more registers, so a thread handles less.
"""
_GRAIN = tl.constexpr(32)
"""Number of neighbouring values over which a mask is constant. Their codes take 16 bytes."""


@triton.jit
def _inside(index, count, GRAIN: tl.constexpr):
    """Return index < count, in a form that the compiler recognises as constant over GRAIN neighbouring values.

    count must be a multiple of GRAIN.
    """
    return index // GRAIN * GRAIN < count


@triton.jit
def _quantize_tile(W, packed, absmax, first, left, BLOCK: tl.constexpr, TILE: tl.constexpr, GRAIN: tl.constexpr):
    ROWS: tl.constexpr = TILE // BLOCK
    row, byte = tl.arange(0, ROWS), tl.arange(0, TILE // 2)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = load_as_float32(W + first + at, mask=_inside(at, left, GRAIN), other=0.0)
    # The bits of magnitudes, read as integers, have the order of the numbers, and those of a NaN are the largest.
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    scaled = tl.where(largest[:, None] == 0, 0.0, tl.div_rn(values, tl.broadcast_to(largest[:, None], [ROWS, BLOCK])))
    codes = nearest_code(scaled)
    if GRAIN == 1:  # the last byte is padded with the code of 0, also in a block with a NaN
        codes = tl.where(at < left, codes, ZERO)
    high, low = tl.split(tl.reshape(codes, [TILE // 2, 2]))
    tl.store(
        packed + first // 2 + byte,
        (high << 4 | low).to(tl.uint8),
        mask=_inside(byte, (left + 1) // 2, (GRAIN + 1) // 2),
    )
    tl.store(absmax + first // BLOCK + row, largest, mask=row * BLOCK < left)


@triton.jit
def _quantize(W, packed, absmax, count, BLOCK: tl.constexpr, TILE: tl.constexpr, RAGGED: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - first, TILE).to(tl.int32)
    if RAGGED and left < TILE:
        _quantize_tile(W, packed, absmax, first, left, BLOCK, TILE, 1)
    else:
        _quantize_tile(W, packed, absmax, first, left, BLOCK, TILE, _GRAIN)


@triton.jit
def _dequantize_tile(
    packed, levels, scale, out, first, left, BLOCK: tl.constexpr, TILE: tl.constexpr, GRAIN: tl.constexpr
):
    """Decode one tile of values. scale: the absmax of each block in the tile, float32 (TILE // BLOCK,)."""
    at, byte = tl.arange(0, TILE), tl.arange(0, TILE // 2)
    codes = tl.load(packed + first // 2 + byte, mask=_inside(byte, (left + 1) // 2, (GRAIN + 1) // 2), other=0)
    high, low = tl.load(levels + (codes >> 4)), tl.load(levels + (codes & 15))
    of_blocks = tl.reshape(tl.join(high, low), [TILE // BLOCK, BLOCK])
    values = tl.reshape(of_blocks * scale[:, None], [TILE])
    store_as(out + first + at, values, mask=_inside(at, left, GRAIN))


@triton.jit
def _dequantize(packed, levels, absmax, out, count, BLOCK: tl.constexpr, TILE: tl.constexpr, RAGGED: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - first, TILE).to(tl.int32)
    row = tl.arange(0, TILE // BLOCK)
    scale = tl.load(absmax + first // BLOCK + row, mask=row * BLOCK < left, other=0.0)
    if RAGGED and left < TILE:
        _dequantize_tile(packed, levels, scale, out, first, left, BLOCK, TILE, 1)
    else:
        _dequantize_tile(packed, levels, scale, out, first, left, BLOCK, TILE, _GRAIN)


@triton.jit
def _dequantize_double(
    packed, levels, codes, absmax2, offset, code, out, count,
    SECOND: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - first, TILE).to(tl.int32)
    row = tl.arange(0, TILE // BLOCK)
    block, here = first // BLOCK + row, row * BLOCK < left
    centred = tl.load(code + tl.load(codes + block, mask=here, other=0).to(tl.int32))
    # The format rounds the product and the sum, so the launch disables fused multiply-adds.
    scale = centred * tl.load(absmax2 + block // SECOND, mask=here, other=0.0) + tl.load(offset)
    if RAGGED and left < TILE:
        _dequantize_tile(packed, levels, scale, out, first, left, BLOCK, TILE, 1)
    else:
        _dequantize_tile(packed, levels, scale, out, first, left, BLOCK, TILE, _GRAIN)


def _launch(kernel: Any, tile: int, count: int, block: int, *arguments: Any, **constants: int) -> None:
    if block < _GRAIN.value or block & (block - 1):
        raise ValueError(f"block must be a power of two of at least {_GRAIN.value}, got {block}")
    tile, ragged = max(tile, block), count % _GRAIN.value != 0
    if not count:
        return
    launch(
        kernel, (triton.cdiv(count, tile),),
        *arguments, count, BLOCK=block, TILE=tile, RAGGED=ragged, **constants, enable_fp_fusion=False,
    )  # fmt: skip


def quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise W to NF4, and return (packed, absmax).

    W: n values of any shape, float32, bfloat16 or float16. packed: uint8 (ceil(n / 2),). The first value of a pair has
    the high four bits. absmax: float32 (ceil(n / block),).

    Blocks are consecutive in W.flatten(). The last block may be short. A value midway between two levels gets the lower
    level. A block of zeros has absmax 0. If a block has a NaN or an infinity, so has its absmax. An odd number of codes
    is padded with the code of 0. Raises ValueError for a block that is not a power of two of at least 32.
    """
    flat = W.detach().contiguous()
    packed = torch.empty(triton.cdiv(flat.numel(), 2), dtype=torch.uint8, device=W.device)
    absmax = torch.empty(triton.cdiv(flat.numel(), block), dtype=torch.float32, device=W.device)
    _launch(_quantize, _QUANTIZED_TILE, flat.numel(), block, flat, packed, absmax)
    return packed, absmax


def dequantize(
    packed: Tensor, absmax: Tensor, block: int, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return the decoded values in the given shape and dtype: level x absmax, computed in float32 and rounded once.

    packed, absmax: as returned by `quantize`. out: None, or contiguous memory for the result. Raises ValueError for a
    block that is not a power of two of at least 32, and if the length of `packed` or `absmax` does not fit `shape`.
    """
    check_sizes(packed, absmax, block, shape)
    values, levels = _output(out, packed, shape, dtype), table(packed.device)
    _launch(_dequantize, _TILE, prod(shape), block, packed.contiguous(), levels, absmax.float().contiguous(), values)
    return values


def dequantize_double(
    packed: Tensor,
    codes: Tensor,
    absmax2: Tensor,
    offset: Tensor,
    code: Tensor,
    block: int,
    second_block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a weight whose absmax is stored as code[codes] x absmax2 + offset (arXiv:2305.14314, section 3).

    codes: uint8, one per block of `block` weights. absmax2: float32, one per `second_block` codes. offset: one float32
    number. code: the values of the 8-bit type, float32 (256,). The result and the other arguments are those of
    `dequantize`. Raises ValueError as `dequantize` does.
    """
    check_second_sizes(codes, absmax2, offset, second_block)
    check_sizes(packed, codes, block, shape)
    values = _output(out, packed, shape, dtype)
    constants = [one.contiguous() for one in (codes, absmax2, offset, code)]
    pointers = (packed.contiguous(), table(packed.device), *constants, values)
    _launch(_dequantize_double, _TILE, prod(shape), block, *pointers, SECOND=second_block)
    return values


def _output(out: Tensor | None, packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    return out[: prod(shape)].view(tuple(shape))


_BYTES, _FLOATS = "*u8", "*fp32"


def _specimens(values: str, block: int, ragged: bool = False) -> list[Specimen]:
    """Return instances of the three kernels for ahead-of-time compilation.

    values: Triton type of the weight, such as `*bf16`. ragged: True if the number of values is not a multiple of 32, so
    that the last program masks each value.
    """
    packed = {"packed": _BYTES, "levels": _FLOATS}
    twice = {"codes": _BYTES, "absmax2": _FLOATS, "offset": _FLOATS, "code": _FLOATS}
    return [
        Specimen(
            name=f"nf4.{kernel.__name__.strip('_')}-{values[1:]}-{block}{'-ragged' if ragged else ''}",
            kernel=kernel,
            signature={**arguments, "count": "i32"},
            constants={"BLOCK": block, "TILE": tile, "RAGGED": ragged, **constants},
            divisible=tuple(arguments),
            kind="streaming",
            separate_roundings=kernel is not _quantize,
            narrow_loads=narrow + 32 * (ragged and kernel is not _quantize),
        )
        for kernel, tile, arguments, constants, narrow in (
            (_quantize, _QUANTIZED_TILE, {"W": values, "packed": _BYTES, "absmax": _FLOATS}, {}, 0),
            (_dequantize, _TILE, {**packed, "absmax": _FLOATS, "out": values}, {}, 0),
            (_dequantize_double, _TILE, {**packed, **twice, "out": values}, {"SECOND": 256}, 2),
        )
    ]


SPECIMENS = [
    *_specimens("*bf16", 64),
    *_specimens("*bf16", 64, ragged=True),
    *_specimens("*bf16", 4096),
    *_specimens("*fp16", 64),
    *_specimens("*fp32", 64),
]
