"""Matrix products from many features to a low rank, such as (x * mask) A^T.

A launch reads x once if the rank is at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.device import interpreted
from harness.kernels.triton.support.launch import KernelLaunch, meta, strides
from harness.kernels.triton.support.matrix_product import accumulate
from harness.kernels.triton.support.rounding import load_as_float32, store_as


@triton.jit
def _shrink(
    out, left, right, mask, column_scale, unscaled, times, sums, scale, M, K, R,
    left_m, left_k, right_k, right_r, mask_m, mask_k,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile of `out`. The arguments are documented in `shrink` and `shrink_and_sum`.

    `out`, `unscaled` and `times` have shape (M, R). `sums` has one row for each block of rows, and R columns. All four
    are contiguous. An optional argument that is None has no effect.
    """
    block = tl.program_id(0)
    rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc = accumulate(
        acc, left, right, mask, None, rows, columns, M, R, K,
        left_m, left_k, right_k, right_r, mask_m, mask_k, BLOCK_K, EVEN_K,
    )  # fmt: skip
    at = rows[:, None] * R + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < R)
    if unscaled is not None:
        store_as(unscaled + at, acc, mask=inside)
    if times is not None:  # rows beyond the end are zero
        of_block = tl.sum(acc * load_as_float32(times + at, mask=inside, other=0.0), axis=0)
        tl.store(sums + block.to(tl.int64) * R + columns, of_block, mask=columns < R)
    acc *= scale
    if column_scale is not None:
        acc *= load_as_float32(column_scale + columns, mask=columns < R, other=0.0)[None, :]
    store_as(out + at, acc, mask=inside)


def shrink(
    left: Tensor,
    right: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    column_scale: Tensor | None = None,
    unscaled: Tensor | None = None,
) -> Tensor:
    """Return scale * ((left * mask) @ right) * column_scale, shape (M, R), rounded once.

    `left` and `mask` have shape (M, K), and `right` has shape (K, R). All three have the same dtype and any strides.
    `column_scale` is contiguous and has shape (R,). `unscaled` is a contiguous tensor of shape (M, R). If it is given,
    the product without `scale` and `column_scale` is written to it.
    """
    out = torch.empty((len(left), right.shape[1]), dtype=left.dtype, device=left.device)
    if out.numel():
        _launch(out, left, right, scale, mask=mask, column_scale=column_scale, unscaled=unscaled).run()
    return out


def shrink_and_sum(left: Tensor, right: Tensor, column_scale: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Compute P = left @ right. Return P * column_scale, and the sum of P * times over the rows.

    `left` has shape (M, K), and `right` has shape (K, R). `times` (M, R) and `column_scale` (R,) are contiguous. P is
    not rounded before it is used. The first result has shape (M, R) and the dtype of `left`. The second result has
    shape (R,) and is float32.
    """
    M, R = len(left), right.shape[1]
    out = torch.empty((M, R), dtype=left.dtype, device=left.device)
    sums = torch.empty((triton.cdiv(M, _rows(M)), R), dtype=torch.float32, device=left.device)
    if out.numel():
        _launch(out, left, right, 1.0, column_scale=column_scale, times=times, sums=sums).run()
    return out, sums.sum(0)


_K_OF_RANKS = {16: 128, 32: 64, 64: 64, 128: 32}
"""Number of ranks in a block -> number of features per iteration, in 16 bits.

With more features, a launch with a mask would spill registers.
"""


def _rows(M: int) -> int:
    """Return the number of rows per program. For few tokens it is smaller, so that there are enough programs."""
    if interpreted():
        return 128
    return 64 if M >= 8192 else 32 if M >= 2048 else 16


def _launch(out: Tensor, left: Tensor, right: Tensor, scale: float, **optional: Tensor | None) -> KernelLaunch:
    """Return a launch of `_shrink`. `optional` may have mask, column_scale, unscaled, times and sums."""
    (M, K), R = left.shape, right.shape[1]
    block_m, block_r = _rows(M), min(max(16, triton.next_power_of_2(R)), 128)
    block_k = 128 if interpreted() else _K_OF_RANKS[block_r] if left.element_size() == 2 else 32
    none = dict.fromkeys(("mask", "column_scale", "unscaled", "times", "sums"))
    arguments = {
        "out": out, "left": left, "right": right, **none, **optional, "scale": float(scale), "M": M, "K": K, "R": R,
        **strides("left_m left_k", left), **strides("right_k right_r", right),
        **strides("mask_m mask_k", optional.get("mask")),
    }  # fmt: skip
    constants = {"BLOCK_M": block_m, "BLOCK_R": block_r, "BLOCK_K": block_k, "EVEN_K": K % block_k == 0}
    grid = (triton.cdiv(M, block_m), triton.cdiv(R, block_r))
    return KernelLaunch(_shrink, grid, arguments, constants, num_warps=4, num_stages=3)


def _specimens() -> list[Specimen]:
    """Return instances of `_shrink` for ahead-of-time compilation.

    They have the sizes of a layer with 4096 inputs and 14336 outputs. The ranks are 16 to 128, and 256 for VeRA.
    """

    def of(name: str, M: int, K: int, R: int, dtype: torch.dtype, forward: bool, *, vera: bool = False) -> Specimen:
        right = meta(dtype, R, K).T if forward else meta(dtype, K, R)
        optional = {"mask": meta(dtype, M, K)} if forward and not vera else {}
        if vera:
            sums = {"times": meta(dtype, M, R), "sums": meta(torch.float32, M // 64, R)}
            optional = {"column_scale": meta(dtype, R), **({"unscaled": meta(dtype, M, R)} if forward else sums)}
        return _launch(meta(dtype, M, R), meta(dtype, M, K), right, 2.0, **optional).specimen(f"shrink.{name}")

    return [
        of("forward-mask-bf16", 8192, 4096, 16, torch.bfloat16, True),
        of("backward-bf16", 8192, 14336, 16, torch.bfloat16, False),
        of("backward-bf16-few-rows", 512, 14336, 16, torch.bfloat16, False),
        of("forward-mask-bf16-rank-32", 2048, 4096, 32, torch.bfloat16, True),
        of("forward-mask-bf16-rank-128", 2048, 4096, 128, torch.bfloat16, True),
        of("forward-mask-fp32", 8192, 4096, 16, torch.float32, True),
        of("vera-forward-bf16", 8192, 4096, 256, torch.bfloat16, True, vera=True),
        of("vera-backward-bf16", 8192, 14336, 256, torch.bfloat16, False, vera=True),
    ]


SPECIMENS = _specimens()
