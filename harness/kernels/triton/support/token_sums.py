"""Sums over tokens, such as the gradients of an adapter.

Partial sums are added in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.device import interpreted
from harness.kernels.triton.support.launch import KernelLaunch, meta, strides
from harness.kernels.triton.support.matrix_product import product
from harness.kernels.triton.support.rounding import load_as_float32, to_dtype, to_float32

_PROGRAMS = 256
"""Number of programs that keeps a large GPU busy. It is fixed, so that a sum rounds equally on every GPU."""


@triton.jit
def _outer_sum(
    out, wide, mask, narrow, weights, M, N, R, per_part,
    wide_m, wide_n, mask_m, mask_n, narrow_m, narrow_r, weights_n, weights_r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute (wide * mask)^T @ narrow, shape (N, R), over one part of the tokens, and write it to out[part].

    If `weights` (N, R) is given, write row sums instead: multiply the product by `weights` element by element, sum each
    row over one block of columns, and write the N sums to out[part, block].
    """
    part, block = tl.program_id(2).to(tl.int64), tl.program_id(1)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    m = part * per_part + tl.arange(0, BLOCK_M)
    end = tl.minimum((part + 1) * per_part, M)
    wide += m[:, None] * wide_m + n[None, :] * wide_n
    narrow += m[:, None] * narrow_m + r[None, :] * narrow_r
    if mask is not None:
        mask += m[:, None] * mask_m + n[None, :] * mask_n
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, per_part, BLOCK_M):
        here = start + m[:, None] < end
        tile = tl.load(wide, mask=here & (n[None, :] < N), other=0.0)
        if mask is not None:
            factor = load_as_float32(mask, mask=here & (n[None, :] < N), other=0.0)
            tile = to_dtype(to_float32(tile) * factor, narrow.dtype.element_ty)
            mask += BLOCK_M * mask_m
        acc = product(tl.trans(tile), tl.load(narrow, mask=here & (r[None, :] < R), other=0.0), acc)
        wide += BLOCK_M * wide_m
        narrow += BLOCK_M * narrow_m
    inside = (n[:, None] < N) & (r[None, :] < R)
    if weights is not None:
        acc *= load_as_float32(weights + n[:, None] * weights_n + r[None, :] * weights_r, mask=inside, other=0.0)
        tl.store(out + (part * tl.num_programs(1) + block) * N + n, tl.sum(acc, axis=1), mask=n < N)
    else:
        tl.store(out + part * N * R + n[:, None] * R + r[None, :], acc, mask=inside)


@triton.jit
def _product_sum(
    out, a, b, M, N, per_part, a_m, a_n, b_m, b_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sum a * b over one part of the M tokens, for each of N columns, and write the N sums to out[part]."""
    part = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    end = tl.minimum((part + 1) * per_part, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, per_part, BLOCK_M):
        m = part * per_part + start + tl.arange(0, BLOCK_M)
        inside = (m[:, None] < end) & (n[None, :] < N)
        of_a = load_as_float32(a + m[:, None] * a_m + n[None, :] * a_n, mask=inside, other=0.0)
        acc += of_a * load_as_float32(b + m[:, None] * b_m + n[None, :] * b_n, mask=inside, other=0.0)
    tl.store(out + part * N + n, tl.sum(acc, axis=0), mask=n < N)


def outer_sum(wide: Tensor, narrow: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return (wide * mask)^T @ narrow, a sum over M tokens, in float32 with shape (N, R).

    `wide` and `mask` have shape (M, N), and `narrow` has shape (M, R). All three have the same dtype and any strides.
    """
    if not wide.shape[1] * narrow.shape[1]:
        return wide.new_zeros((wide.shape[1], narrow.shape[1]), dtype=torch.float32)
    return _outer(wide, narrow, mask, None).sum(0)


def weighted_outer_sum(wide: Tensor, narrow: Tensor, weights: Tensor) -> Tensor:
    """Return the row sums of (wide^T @ narrow) * weights in float32, shape (N,).

    `weights` has shape (N, R), like wide^T @ narrow, which is never stored as a whole.
    """
    if not weights.numel():
        return wide.new_zeros(wide.shape[1], dtype=torch.float32)
    return _outer(wide, narrow, None, weights).sum((0, 1))


def product_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return the column sums of a * b in float32, shape (N,). `a` and `b` have shape (M, N), with one row per token."""
    if not a.shape[1]:
        return a.new_zeros(0, dtype=torch.float32)
    parts, per_part = _parts(len(a), triton.cdiv(a.shape[1], 64), 32)
    out = torch.empty((parts, a.shape[1]), dtype=torch.float32, device=a.device)
    _product_launch(out, a, b, per_part).run()
    return out.sum(0)


def _parts(M: int, programs: int, block: int) -> tuple[int, int]:
    """Divide M tokens into parts. Return (number of parts, tokens per part). The second is a multiple of `block`.

    programs: number of programs per part.
    """
    wanted = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(M, 8 * block))
    per_part = triton.cdiv(triton.cdiv(max(M, 1), max(wanted, 1)), block) * block
    return triton.cdiv(max(M, 1), per_part), per_part


def _outer(wide: Tensor, narrow: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    launch = _outer_launch(wide, narrow, mask, weights)
    launch.run()
    out: Tensor = launch.arguments["out"]
    return out


def _outer_launch(wide: Tensor, narrow: Tensor, mask: Tensor | None, weights: Tensor | None) -> KernelLaunch:
    (M, N), R = wide.shape, narrow.shape[1]
    block_n, block_r = 64, min(max(16, triton.next_power_of_2(R)), 64)
    block_m = 128 if interpreted() else 64 if wide.element_size() == 2 else 32
    grid = (triton.cdiv(N, block_n), triton.cdiv(R, block_r))
    parts, per_part = _parts(M, grid[0] * grid[1], block_m)
    shape = (parts, N, R) if weights is None else (parts, grid[1], N)
    arguments = {
        "out": torch.empty(shape, dtype=torch.float32, device=wide.device), "wide": wide, "mask": mask,
        "narrow": narrow, "weights": weights, "M": M, "N": N, "R": R, "per_part": per_part,
        **strides("wide_m wide_n", wide), **strides("mask_m mask_n", mask), **strides("narrow_m narrow_r", narrow),
        **strides("weights_n weights_r", weights),
    }  # fmt: skip
    return KernelLaunch(
        _outer_sum, (*grid, parts), arguments, {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r}, 4, 3
    )


def _product_launch(out: Tensor, a: Tensor, b: Tensor, per_part: int) -> KernelLaunch:
    (M, N), block_n = a.shape, 64
    arguments = {
        "out": out, "a": a, "b": b, "M": M, "N": N, "per_part": per_part,
        **strides("a_m a_n", a), **strides("b_m b_n", b),
    }  # fmt: skip
    return KernelLaunch(
        _product_sum, (triton.cdiv(N, block_n), len(out)), arguments, {"BLOCK_M": 32, "BLOCK_N": block_n}
    )


def _specimens() -> list[Specimen]:
    """Return instances of the kernels of this file for ahead-of-time compilation.

    They have the sizes of a layer with 4096 inputs, 14336 outputs and 8192 tokens. The rank is 16, and 256 for VeRA.
    """

    def of(name: str, N: int, R: int, dtype: torch.dtype, *optional: str) -> Specimen:
        mask = meta(dtype, 8192, N) if "mask" in optional else None
        weights = meta(dtype, N, R) if "weights" in optional else None
        launch = _outer_launch(meta(dtype, 8192, N), meta(dtype, 8192, R), mask, weights)
        return launch.specimen(f"token_sums.{name}")

    a = meta(torch.bfloat16, 8192, 14336)
    product_launch = _product_launch(meta(torch.float32, 2, 14336), a, a, 4096)
    return [
        of("outer-bf16", 14336, 16, torch.bfloat16),
        of("outer-mask-bf16", 4096, 16, torch.bfloat16, "mask"),
        of("outer-weights-bf16", 14336, 256, torch.bfloat16, "weights"),
        of("outer-fp32", 4096, 16, torch.float32),
        product_launch.specimen("token_sums.product-bf16", "other"),
    ]


SPECIMENS = _specimens()
