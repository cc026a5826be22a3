"""A matrix product with a low-rank term in its accumulator: left @ right + S @ T with factors and a bias, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Kind, Specimen
from harness.kernels.triton.support.gemm_tiles import EXACT, FEW_ROWS, LARGE, LARGEST, GemmTile, gemm_tile, rank_block
from harness.kernels.triton.support.launch import Launch, strides
from harness.kernels.triton.support.matrix_product import accumulate, is_wide, program_tile
from harness.kernels.triton.support.rounding import load_as_float32, store_as


@triton.jit
def _low_rank_gemm(
    out, left, right, S, T, term_scale, term_mask, left_scale, gain, bias, product, scale, M, N, K, R,
    left_m, left_k, right_k, right_n, S_m, S_r, T_r, T_n, mask_m, mask_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute the term first, so that the long loop adds to the same accumulator. None disables an argument."""
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

    left (M, K), right (K, N), S (M, R), T (R, N), term_mask (M, N), all of one dtype, with any strides; contiguous
    vectors: term_scale, gain, bias (N,), left_scale (K,). Summed in float32 and rounded once. product: a contiguous (M, N)
    output for the value before the gain.
    """
    M, N = len(left), right.shape[1]
    out = torch.empty((M, N), dtype=left.dtype, device=left.device)
    if out.numel():
        crowded = any(one is not None for one in (left_scale, term_mask, product))
        tile = gemm_tile(M, N, left.dtype, left.device, crowded=crowded)
        optional = {
            "term_scale": term_scale, "term_mask": term_mask, "left_scale": left_scale,
            "gain": gain, "bias": bias, "product": product,
        }  # fmt: skip
        _launch(tile, out, left, right, S, T, scale, optional).run()
    return out


def _launch(
    tile: GemmTile,
    out: Tensor,
    left: Tensor,
    right: Tensor,
    S: Tensor,
    T: Tensor,
    scale: float,
    optional: dict[str, Tensor | None],
) -> Launch:
    (M, K), (R, N) = left.shape, T.shape
    term_mask = optional["term_mask"]
    arguments = {
        "out": out, "left": left, "right": right, "S": S, "T": T, **optional, "scale": float(scale),
        "M": M, "N": N, "K": K, "R": R,
        **strides("left_m left_k", left), **strides("right_k right_n", right), **strides("S_m S_r", S),
        **strides("T_r T_n", T), **strides("mask_m mask_n", term_mask),
    }  # fmt: skip
    block_r = rank_block(R)
    constants = {
        **tile.constants(), "BLOCK_R": block_r, "EVEN_K": K % tile.k == 0, "EVEN_R": R % block_r == 0,
        "WIDE": is_wide(N, right.stride(1), T.stride(1), 1 if term_mask is None else term_mask.stride(1)),
    }  # fmt: skip
    return Launch(_low_rank_gemm, (tile.programs(M, N),), arguments, constants, tile.warps, tile.stages)


def _specimens() -> list[Specimen]:
    """Return specimens of the products in training of a layer 4096 -> 14336 with 8192 tokens."""
    M, D, E, R = 8192, 4096, 14336, 16

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def of(name: str, tile: GemmTile, dtype: torch.dtype, N: int, K: int, backward: bool, *given: str) -> Specimen:
        shapes = {"term_mask": (M, N), "product": (M, N), "left_scale": (K,)}
        floats = ("gain", "left_scale")
        optional = {
            key: meta(*shapes.get(key, (N,)), dtype=torch.float32 if key in floats else dtype) if key in given else None
            for key in ("term_scale", "term_mask", "left_scale", "gain", "bias", "product")
        }
        right = meta(K, N, dtype=dtype) if backward else meta(N, K, dtype=dtype).T
        T = meta(R, N, dtype=dtype) if backward else meta(N, R, dtype=dtype).T
        operands = meta(M, N, dtype=dtype), meta(M, K, dtype=dtype), right, meta(M, R, dtype=dtype), T
        kind: Kind = "gemm" if dtype != torch.float32 else "other"
        launch = _launch(tile, *operands, 2.0, optional)
        return launch.specimen(f"low_rank_gemm.{name}", kind, oldest=90 if tile == LARGEST else 80)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
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
    ]


SPECIMENS = _specimens()
