"""Inner loop of the matrix products: multiply tiles of two matrices and sum in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.device import interpreted
from harness.kernels.triton.support.rounding import load_as_float32, to_dtype, to_float32

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def product(left, right, acc):
    """Return acc + left @ right in float32. float32 operands are never multiplied as TF32."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of 16-bit operands
        left, right = to_float32(left), to_float32(right)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def program_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Return the rows (int64) and the columns of the output tile that this program computes.

    The tiles are ordered so that consecutive programs find the same rows and columns in the L2 cache. WIDE: True to
    return the columns as int64, too, which takes registers; see `is_wide`.
    """
    GROUP: tl.constexpr = 8
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    rows = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows.to(tl.int64), columns.to(tl.int64) if WIDE else columns


def is_wide(N: int, *strides: int) -> bool:
    """Return whether the offset of the last of N columns exceeds int32 with one of these strides."""
    return N * max(strides) >= 2**31


@triton.jit
def accumulate(
    acc, left, right, mask, scale, rows, columns, M, N, K,
    left_m, left_k, right_k, right_n, mask_m, mask_k,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return acc + ((left * mask) * scale) @ right for the rows and columns of one tile.

    left and mask (M, K) and right (K, N) are pointers, each with two strides. scale: pointer to K float32 numbers. mask
    and scale may be None. EVEN_K: whether BLOCK_K divides K, so that loads need no bounds check along K.
    """
    k = tl.arange(0, BLOCK_K)
    left += rows[:, None] * left_m + k[None, :] * left_k
    right += k[:, None] * right_k + columns[None, :] * right_n
    if mask is not None:
        mask += rows[:, None] * mask_m + k[None, :] * mask_k
    dtype: tl.constexpr = right.dtype.element_ty
    for start in range(0, K, BLOCK_K):
        in_left, in_right = rows[:, None] < M, columns[None, :] < N
        if not EVEN_K:
            in_left, in_right = in_left & (start + k[None, :] < K), in_right & (start + k[:, None] < K)
        tile = tl.load(left, mask=in_left, other=0.0)
        if mask is not None:
            tile = to_dtype(to_float32(tile) * load_as_float32(mask, mask=in_left, other=0.0), dtype)
            mask += BLOCK_K * mask_k
        if scale is not None:
            of_k = tl.load(scale + start + k, mask=start + k < K, other=0.0)
            tile = to_dtype(to_float32(tile) * of_k[None, :], dtype)
        acc = product(tile, tl.load(right, mask=in_right, other=0.0), acc)
        left += BLOCK_K * left_k
        right += BLOCK_K * right_k
    return acc
