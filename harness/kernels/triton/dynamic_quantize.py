"""Blockwise 8-bit codes of the dynamic map (arXiv:2110.02861, section 2). Each code is exactly the nearest one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.device import interpreted
from harness.kernels.triton.support.dynamic_map import largest_magnitude, nearest, relative, tables
from harness.kernels.triton.support.launch import launch
from harness.kernels.triton.support.rounding import load_as_float32

_COLUMNS = 2048  # elements of a block at a time
_TILE = 1 << 14 if interpreted() else 2048  # elements per program


@triton.jit
def _quantize(
    x, codes, absmax, midpoints, buckets, n,
    block: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, signed: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    start = row[:, None] * block
    largest = tl.zeros([rows], tl.float32)
    for first in range(0, block, columns):
        column = first + tl.arange(0, columns)[None, :]
        inside = (column < block) & (start + column < n)
        part = load_as_float32(x + start + column, mask=inside, other=0.0)
        # Bits are compared instead of numbers, so that a NaN counts as the largest.
        most = tl.maximum(largest.to(tl.int32, bitcast=True), largest_magnitude(part, 1).to(tl.int32, bitcast=True))
        largest = most.to(tl.float32, bitcast=True)
    for first in range(0, block, columns):
        column = first + tl.arange(0, columns)[None, :]
        inside = (column < block) & (start + column < n)
        part = load_as_float32(x + start + column, mask=inside, other=0.0)
        code = nearest(relative(part, largest[:, None]), midpoints, buckets, signed)
        tl.store(codes + start + column, code.to(tl.uint8), mask=inside)
    tl.store(absmax + row, largest, mask=row * block < n)


def dynamic_quantize(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax). codes: uint8, in the order of x.flatten(). absmax: float32, one per block.

    x: any shape, float32, bfloat16 or float16. The last block may be short. The code of an element stands for the value
    of the map that is nearest to element / absmax. A tie goes to the lower value. If a block has a NaN or an infinity,
    so has its absmax. Raises ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    x = x.detach().contiguous()
    blocks = triton.cdiv(x.numel(), block)
    codes = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(blocks, device=x.device)
    if blocks:
        columns = min(triton.next_power_of_2(block), _COLUMNS)
        rows = min(_TILE // columns, triton.next_power_of_2(blocks))
        _, midpoints, buckets = tables(x.device, signed)
        launch(
            _quantize, (triton.cdiv(blocks, rows),),
            x, codes, absmax, midpoints, buckets, x.numel(),
            block=block, rows=rows, columns=columns, signed=signed, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax


_POINTERS = {"x": "*bf16", "codes": "*u8", "absmax": "*fp32", "midpoints": "*fp32", "buckets": "*u8"}
SPECIMENS = [
    Specimen(
        name=f"dynamic_quantize-{'signed' if signed else 'unsigned'}-{block}",
        kernel=_quantize,
        signature=_POINTERS | {"n": "i32"},
        constants={"block": block, "rows": 2048 // min(block, 2048), "columns": min(block, 2048), "signed": signed},
        divisible=(*_POINTERS, "n"),
        kind="streaming",
        narrow_loads=16,  # a bucket look-up for each of 16 elements
    )
    for signed, block in ((True, 256), (False, 4096))
]
