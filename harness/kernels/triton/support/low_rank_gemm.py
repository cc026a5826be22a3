"""A matrix product that also adds a low-rank term.

The result is left @ right + S @ T, with factors and a bias, in one float32 accumulator that is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.triton.support.gemm_tiles import (
    CANDIDATES,
    EXACT,
    FEW_ROWS,
    LARGE,
    LARGEST,
    GemmTile,
    gemm_tile,
    rank_block,
)
from harness.kernels.triton.support.launch import KernelLaunch, meta, strides
from harness.kernels.triton.support.matrix_product import accumulate, is_wide, program_tile
from harness.kernels.triton.support.rounding import load_as_float32, store_as
from harness.kernels.triton.support.tuned_tiles import tuned

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The matrices of a product: out (M, N), left (M, K), right (K, N), S (M, R), T (R, N)."""
_OPTIONAL = ("term_scale", "term_mask", "left_scale", "gain", "bias", "product")


@triton.jit
def _low_rank_gemm(
    out, left, right, S, T, term_scale, term_mask, left_scale, gain, bias, product, scale, M, N, K, R,
    left_m, left_k, right_k, right_n, S_m, S_r, T_r, T_n, mask_m, mask_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the result of `low_rank_gemm`. An optional argument that is None has no effect.

    The low-rank term is computed first, so that the long loop over K adds to it.
    """
    rows, columns = program_tile(M, N, BLOCK_M, BLOCK_N, WIDE)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(acc, S, T, None, None, rows, columns, M, N, R, S_m, S_r, T_r, T_n, 0, 0, BLOCK_R, EVEN_R)
    acc *= scale
    if term_scale is not None:
        acc *= load_as_float32(term_scale + columns, mask=columns < N, other=0.0)[None, :]
    if term_mask is not None:
        at = rows[:, None] * mask_m + columns[None, :] * mask_n
        acc *= load_as_float32(term_mask + at, mask=inside, other=0.0)
    acc = accumulate(
        acc, left, right, None, left_scale, rows, columns, M, N, K,
        left_m, left_k, right_k, right_n, 0, 0, BLOCK_K, EVEN_K,
    )  # fmt: skip
    at = rows[:, None] * N + columns[None, :]
    if product is not None:
        store_as(product + at, acc, mask=inside)
    if gain is not None:
        acc *= load_as_float32(gain + columns, mask=columns < N, other=0.0)[None, :]
    if bias is not None:
        acc += load_as_float32(bias + columns, mask=columns < N, other=0.0)[None, :]
    store_as(out + at, acc, mask=inside)


KERNEL = _low_rank_gemm
"""The kernel behind `low_rank_gemm`. `peft-harness bench --crossovers` tunes its tiles."""


def low_rank_gemm(
    left: Tensor,
    right: Tensor,
    S: Tensor,
    T: Tensor,
    *,
    scale: float = 1.0,
    term_scale: Tensor | None = None,
    term_mask: Tensor | None = None,
    left_scale: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    product: Tensor | None = None,
) -> Tensor:
    """Return gain * ((left * left_scale) @ right + term_mask * (scale S @ T) * term_scale) + bias, shape (M, N).

    Shapes: left (M, K), right (K, N), S (M, R), T (R, N), term_mask (M, N), with any strides. These tensors have one
    dtype. The vectors term_scale, gain and bias (N,) and left_scale (K,) are contiguous. The sum is in float32 and
    rounded once. product: a contiguous output (M, N) for the value before gain and bias.
    """
    M, N = len(left), right.shape[1]
    out = torch.empty((M, N), dtype=left.dtype, device=left.device)
    if out.numel():
        crowded = any(one is not None for one in (left_scale, term_mask, product))
        tile = gemm_tile(M, N, left.dtype, left.device, crowded=crowded)
        if not crowded:
            tile = tuned(tile, KERNEL, M, N, left.dtype, left.device)
        product_launch(
            tile, (out, left, right, S, T), scale=float(scale), term_scale=term_scale, term_mask=term_mask,
            left_scale=left_scale, gain=gain, bias=bias, product=product,
        ).run()  # fmt: skip
    return out


def product_launch(tile: GemmTile, operands: Operands, *, scale: float, **optional: Tensor | None) -> KernelLaunch:
    """Return the launch of the kernel of `low_rank_gemm` with this tile.

    optional: the arguments of `low_rank_gemm` that may be None, by name. A missing argument is None.
    """
    others: dict[str, Any] = dict.fromkeys(_OPTIONAL) | optional
    block_r = rank_block(len(operands[-1]))
    return low_rank_launch(KERNEL, tile, block_r, operands, others["term_mask"], scale=scale, **others)


def low_rank_launch(
    kernel: Any, tile: GemmTile, block_r: int, operands: Operands, mask: Tensor | None, /, **others: Any
) -> KernelLaunch:
    """Return the launch of a kernel for a product with a low-rank term.

    block_r: number of ranks per iteration. mask: the tensor whose strides the kernel gets as mask_m and mask_n. others:
    further arguments of the kernel. They include `mask` itself, under the name of the kernel's argument.
    """
    out, left, right, S, T = operands
    (M, K), (R, N) = left.shape, T.shape
    arguments = {
        "out": out, "left": left, "right": right, "S": S, "T": T, **others, "M": M, "N": N, "K": K, "R": R,
        **strides("left_m left_k", left), **strides("right_k right_n", right), **strides("S_m S_r", S),
        **strides("T_r T_n", T), **strides("mask_m mask_n", mask),
    }  # fmt: skip
    constants = {
        **tile.constants(), "BLOCK_R": block_r, "EVEN_K": K % tile.k == 0, "EVEN_R": R % block_r == 0,
        "WIDE": is_wide(N, right.stride(1), T.stride(1), 1 if mask is None else mask.stride(1)),
    }  # fmt: skip
    return KernelLaunch(kernel, (tile.programs(M, N),), arguments, constants, tile.warps, tile.stages)


def _specimens() -> list[Specimen]:
    """Return instances of the kernel for ahead-of-time compilation, with the matrix products of a training step.

    The layer has 4096 inputs, 14336 outputs and 8192 tokens. Instances with a tile of `CANDIDATES` get the same
    arguments as in the measurement of this tile by `peft-harness bench --crossovers`.
    """
    M, D, E = 8192, 4096, 14336

    def of(
        name: str, tile: GemmTile, dtype: torch.dtype, N: int, K: int, backward: bool, *optional: str, R: int = 16
    ) -> Specimen:
        shapes = {"term_mask": (M, N), "product": (M, N), "left_scale": (K,)}
        others: dict[str, Tensor] = {}
        for key in optional:
            of_key = torch.float32 if key in ("gain", "left_scale") else dtype
            others[key] = meta(of_key, *shapes.get(key, (N,)))
        right, T = (meta(dtype, n, N) if backward else meta(dtype, N, n).T for n in (K, R))
        operands = meta(dtype, M, N), meta(dtype, M, K), right, meta(dtype, M, R), T
        launch = product_launch(tile, operands, scale=2.0, **others)
        return launch.specimen(f"low_rank_gemm.{name}", oldest=90 if tile.m * tile.n >= LARGEST.m * LARGEST.n else 80)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    few, some, large, largest = (CANDIDATES[tile] for tile in (*FEW_ROWS[:2], LARGE, LARGEST))
    tried = (few[2], some[2], large[1], large[2], largest[1])
    return [
        of("forward-bf16-largest", LARGEST, bf16, E, D, False, "bias"),
        of("forward-bf16-large", LARGE, bf16, E, D, False, "bias"),
        of("forward-fp16-largest", LARGEST, fp16, E, D, False),
        of("forward-bf16-few-rows", FEW_ROWS[0], bf16, E, D, False, "bias"),
        of("forward-bf16-32-rows", FEW_ROWS[1], bf16, E, D, False),
        of("backward-mask-bf16-32-rows", FEW_ROWS[1], bf16, D, E, True, "term_mask"),
        of("forward-bf16-wide", LARGE, bf16, 1 << 20, D, False, "bias"),
        of("forward-fp32", EXACT, fp32, E, D, False, "bias"),
        of("vera-forward-bf16-largest", LARGEST, bf16, E, D, False, "bias", "term_scale"),
        of("dora-forward-bf16-large", LARGE, bf16, E, D, False, "bias", "gain", "product"),
        of("backward-bf16-largest", LARGEST, bf16, D, E, True),
        of("backward-mask-bf16-large", LARGE, bf16, D, E, True, "term_mask"),
        of("dora-backward-bf16-large", LARGE, bf16, D, E, True, "left_scale"),
        *(of(f"candidate-{one.m}x{one.n}", one, bf16, E, D, False, "bias", "term_scale", R=64) for one in tried),
    ]


SPECIMENS = _specimens()
