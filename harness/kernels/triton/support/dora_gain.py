"""The gain of DoRA, m / ||W + s B A|| per row (arXiv:2402.09353), in one pass over W that never stores B A.

The kernel computes the norm n of a row from the sum W + s B A itself. The expansion n^2 = ||W||^2 + 2 s <B, W A^T> +
s^2 <B, B (A A^T)> also needs no B A, but it is less accurate. With N = ||W|| + ||s B A||, the expansion has the
relative error eps N^2 / n^2, and the sum only eps N / n. For a row in which B A cancels W, the expansion is useless. It
is not faster, either: like the sum, it reads all of W and takes E D R multiplications, for W A^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.triton.support.gemm_tiles import rank_block
from harness.kernels.triton.support.launch import KernelLaunch, meta, strides
from harness.kernels.triton.support.matrix_product import product
from harness.kernels.triton.support.rounding import load_as_float32, to_dtype, to_float32


@triton.jit
def _gain(
    gain, norm, W, A, B, m, scaling, E, D, R, W_e, W_d, A_r, A_d, B_e, B_r,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_RANK: tl.constexpr,
):  # fmt: skip
    """Compute the gain and the norm of one block of rows.

    WHOLE_RANK: whether BLOCK_R covers all ranks, so that B is read only once.
    """
    e = (tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    of_B = B + e[:, None] * B_e + r[None, :] * B_r
    of_A = A + r[:, None] * A_r + d[None, :] * A_d
    W += e[:, None] * W_e + d[None, :] * W_d
    if WHOLE_RANK:
        b = tl.load(of_B, mask=(e[:, None] < E) & (r[None, :] < R), other=0.0)
    squares = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, D, BLOCK_D):
        in_D = start + d[None, :] < D
        update = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        if WHOLE_RANK:
            update = product(b, tl.load(of_A + start * A_d, mask=(r[:, None] < R) & in_D, other=0.0), update)
        else:
            for first in range(0, R, BLOCK_R):
                b = tl.load(of_B + first * B_r, mask=(e[:, None] < E) & (first + r[None, :] < R), other=0.0)
                a = tl.load(of_A + start * A_d + first * A_r, mask=(first + r[:, None] < R) & in_D, other=0.0)
                update = product(b, a, update)
        row = load_as_float32(W, mask=(e[:, None] < E) & in_D, other=0.0) + scaling * update
        squares += tl.sum(row * row, axis=1)
        W += BLOCK_D * W_d
    rounded = to_dtype(tl.sqrt_rn(squares), m.dtype.element_ty)
    tl.store(norm + e, rounded, mask=e < E)
    divisor = to_float32(rounded)
    of_m = load_as_float32(m + e, mask=e < E, other=0.0)
    tl.store(gain + e, tl.where(divisor > 0, tl.div_rn(of_m, tl.where(divisor > 0, divisor, 1.0)), 0.0), mask=e < E)


def dora_gain(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (gain, norm), both (E,). norm: the norm of each row of W + scaling B A, in the dtype of m.

    gain: m / norm in float32, or 0 where the norm is 0. Shapes: W (E, D), A (R, D), B (E, R), with any strides; m (E,),
    contiguous. The norm is rounded before the division. A new layer, which has this norm as m, then has a gain of
    exactly 1.
    """
    gain, norm = torch.empty(len(W), dtype=torch.float32, device=W.device), torch.empty_like(m)
    _launch(gain, norm, W, A, B, m, scaling).run()
    return gain, norm


def _launch(gain: Tensor, norm: Tensor, W: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float) -> KernelLaunch:
    (E, D), R = W.shape, len(A)
    block_e, block_d, block_r = 32, 128 if W.element_size() == 2 else 64, rank_block(R)
    arguments = {
        "gain": gain, "norm": norm, "W": W, "A": A, "B": B, "m": m, "scaling": float(scaling),
        "E": E, "D": D, "R": R, **strides("W_e W_d", W), **strides("A_r A_d", A), **strides("B_e B_r", B),
    }  # fmt: skip
    constants = {"BLOCK_E": block_e, "BLOCK_D": block_d, "BLOCK_R": block_r, "WHOLE_RANK": block_r >= R}
    return KernelLaunch(_gain, (triton.cdiv(E, block_e),), arguments, constants, num_warps=4, num_stages=3)


def _specimens() -> list[Specimen]:
    """Return instances of the kernel for ahead-of-time compilation, for a weight with 4096 inputs and 14336 outputs."""

    def of(name: str, R: int, dtype: torch.dtype) -> Specimen:
        E, D = 14336, 4096
        norm, W, A, B, m = (meta(dtype, *shape) for shape in ((E,), (E, D), (R, D), (E, R), (E,)))
        return _launch(meta(torch.float32, E), norm, W, A, B, m, 2.0).specimen(f"dora_gain.{name}")

    return [
        of("bf16-rank-16", 16, torch.bfloat16),
        of("bf16-rank-128", 128, torch.bfloat16),
        of("fp32-rank-16", 16, torch.float32),
    ]


SPECIMENS = _specimens()
