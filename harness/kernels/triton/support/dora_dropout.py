"""Kernels for DoRA under dropout, which does not affect the term x W^T.

One accumulator sums the product of W with x and the product of W with the masked x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.triton.support.gemm_tiles import EXACT, LARGE, GemmTile, gemm_tile
from harness.kernels.triton.support.launch import KernelLaunch, meta
from harness.kernels.triton.support.low_rank_gemm import Operands, low_rank_launch
from harness.kernels.triton.support.matrix_product import accumulate, program_tile
from harness.kernels.triton.support.rounding import load_as_float32, store_as


@triton.jit
def _forward(
    out, product, left, right, mask, S, T, gain_minus_one, bias, scale, M, N, K, R,
    left_m, left_k, right_k, right_n, mask_m, mask_n, S_m, S_r, T_r, T_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of out = left @ right + gain_minus_one * product + t + bias, where t is scale S @ T.

    Also store a tile of product = (left * mask) @ right + t. gain_minus_one: DoRA's gain minus 1, one number per
    column.
    """
    rows, columns = program_tile(M, N, BLOCK_M, BLOCK_N, WIDE)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    at = rows[:, None] * N + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(
        acc, left, right, mask, None, rows, columns, M, N, K,
        left_m, left_k, right_k, right_n, mask_m, mask_n, BLOCK_K, EVEN_K,
    )  # fmt: skip
    term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    term = accumulate(term, S, T, None, None, rows, columns, M, N, R, S_m, S_r, T_r, T_n, 0, 0, BLOCK_R, EVEN_R)
    term *= scale
    acc += term
    store_as(product + at, acc, mask=inside)
    acc = acc * tl.load(gain_minus_one + columns, mask=columns < N, other=0.0)[None, :] + term
    acc = accumulate(
        acc, left, right, None, None, rows, columns, M, N, K,
        left_m, left_k, right_k, right_n, 0, 0, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if bias is not None:
        acc += load_as_float32(bias + columns, mask=columns < N, other=0.0)[None, :]
    store_as(out + at, acc, mask=inside)


@triton.jit
def _backward(
    out, left, right, mask, S, T, gain_minus_one, M, N, K, R,
    left_m, left_k, right_k, right_n, mask_m, mask_n, S_m, S_r, T_r, T_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of out = left @ right + mask * ((left * gain_minus_one) @ right + S @ T).

    gain_minus_one: DoRA's gain minus 1, one number for each column of `left`.
    """
    rows, columns = program_tile(M, N, BLOCK_M, BLOCK_N, WIDE)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = accumulate(acc, S, T, None, None, rows, columns, M, N, R, S_m, S_r, T_r, T_n, 0, 0, BLOCK_R, EVEN_R)
    acc = accumulate(
        acc, left, right, None, gain_minus_one, rows, columns, M, N, K,
        left_m, left_k, right_k, right_n, 0, 0, BLOCK_K, EVEN_K,
    )  # fmt: skip
    acc *= load_as_float32(mask + rows[:, None] * mask_m + columns[None, :] * mask_n, mask=inside, other=0.0)
    acc = accumulate(
        acc, left, right, None, None, rows, columns, M, N, K,
        left_m, left_k, right_k, right_n, 0, 0, BLOCK_K, EVEN_K,
    )  # fmt: skip
    store_as(out + rows[:, None] * N + columns[None, :], acc, mask=inside)


def dropped_forward(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    B: Tensor,
    S: Tensor,
    scaling: float,
    mask: Tensor,
    gain_minus_one: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (y, q), both (T, E): y = x W^T + bias + gain_minus_one q + t, and q = (x mask) W^T + t.

    The term t is scaling S B^T. Shapes: x and mask (T, D), W (E, D), B (E, R), S (T, R), bias (E,), all of one dtype.
    gain_minus_one: float32 (E,).
    """
    y, q = (torch.empty((len(x), len(W)), dtype=x.dtype, device=x.device) for _ in range(2))
    if y.numel():
        tile = gemm_tile(len(x), len(W), x.dtype, x.device, crowded=True).shallow()
        others = {"gain_minus_one": gain_minus_one, "product": q, "bias": bias, "scale": float(scaling)}
        _launch(_forward, tile, (y, x, W.T, S, B.T), mask, **others).run()
    return y, q


def dropped_backward(dy: Tensor, W: Tensor, A: Tensor, dS: Tensor, mask: Tensor, gain_minus_one: Tensor) -> Tensor:
    """Return dy W + mask * ((dy * gain_minus_one) W + dS A), which is the gradient of x (T, D).

    Shapes: dy (T, E), W (E, D), A (R, D), dS (T, R), mask (T, D). gain_minus_one: float32 (E,).
    """
    dx = torch.empty((len(dy), W.shape[1]), dtype=dy.dtype, device=dy.device)
    if dx.numel():
        tile = gemm_tile(len(dy), W.shape[1], dy.dtype, dy.device, crowded=True).shallow()
        _launch(_backward, tile, (dx, dy, W, dS, A), mask, gain_minus_one=gain_minus_one).run()
    return dx


def _launch(kernel: Any, tile: GemmTile, operands: Operands, mask: Tensor, **others: Any) -> KernelLaunch:
    block_r = 16  # with two accumulators, more ranks at a time would spill registers
    return low_rank_launch(kernel, tile, block_r, operands, mask, mask=mask, **others)


def _specimens() -> list[Specimen]:
    """Return instances of both kernels for ahead-of-time compilation.

    They have the sizes of a layer with 4096 inputs, 14336 outputs and 8192 tokens.
    """
    M, D, E = 8192, 4096, 14336

    def of(name: str, dtype: torch.dtype, tile: GemmTile, forward: bool, R: int = 16) -> Specimen:
        W, gain_minus_one, mask, S = meta(dtype, E, D), meta(torch.float32, E), meta(dtype, M, D), meta(dtype, M, R)
        of_x, of_y = meta(dtype, M, D), meta(dtype, M, E)
        if forward:
            others = {"gain_minus_one": gain_minus_one, "product": of_y, "bias": meta(dtype, E), "scale": 2.0}
            launch = _launch(_forward, tile, (of_y, of_x, W.T, S, meta(dtype, E, R).T), mask, **others)
        else:
            launch = _launch(
                _backward, tile, (of_x, of_y, W, S, meta(dtype, R, D)), mask, gain_minus_one=gain_minus_one
            )
        return launch.specimen(f"dora_dropout.{name}")

    return [
        of("forward-bf16", torch.bfloat16, LARGE.shallow(), True),
        of("forward-bf16-rank-64", torch.bfloat16, LARGE.shallow(), True, 64),
        of("forward-bf16-rank-40", torch.bfloat16, LARGE.shallow(), True, 40),
        of("backward-bf16", torch.bfloat16, LARGE.shallow(), False),
        of("forward-fp32", torch.float32, EXACT.shallow(), True),
        of("backward-fp32", torch.float32, EXACT.shallow(), False),
    ]


SPECIMENS = _specimens()
