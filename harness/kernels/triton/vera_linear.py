"""VeRA's linear layer on a GPU, as two matrix products.

The first product is d u with u = (x mask) A^T, in the tiles of support/shrink.py. The second product is x W^T, in the
tiles of support/gemm_tiles.py. Its accumulator also adds b * ((d u) B^T).

The gradients of d and b need no temporary of the size of the output y. Let dy be the gradient of y. The gradient of d
is the sum of u * ((dy b) B) over the tokens. The gradient of b is the sum of B * (dy^T (d u)) over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.kernels.torch.support.autocast import once_outside_autocast
from harness.kernels.triton.support.low_rank_arguments import checked, contiguous, matrix
from harness.kernels.triton.support.low_rank_gemm import low_rank_gemm
from harness.kernels.triton.support.shrink import shrink, shrink_and_sum
from harness.kernels.triton.support.token_sums import weighted_outer_sum


class _VeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        b: Tensor,
        d: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        u = torch.empty((len(x), len(A)), dtype=x.dtype, device=x.device)
        h = shrink(x, A.T, mask=mask, column_scale=d, unscaled=u)
        ctx.save_for_backward(W, A, B, b, d, mask, u, h)
        return low_rank_gemm(x, W.T, h, B.T, term_scale=b, bias=bias)

    @staticmethod
    @once_outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, b, d, mask, u, h = ctx.saved_tensors
        need_x, need_b, need_d = (ctx.needs_input_grad[at] for at in (0, 5, 6))
        dx = db = dd = None
        if need_x or need_d:
            dh, sums = shrink_and_sum(dy, b[:, None] * B, d, u)
            dd = sums.to(d.dtype) if need_d else None
            dx = low_rank_gemm(dy, W, dh, A, term_mask=mask) if need_x else None
        if need_b:
            db = weighted_outer_sum(dy, h, B).to(b.dtype)
        return dx, None, None, None, None, db, dd, None


def vera_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    b: Tensor,
    d: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return x W^T + bias + b * ((d * ((x mask) A^T)) B^T), shape (..., E). VeRA, arXiv:2310.11454, eq. 2.

    Shapes: x (..., D), W (E, D), bias (E,), A (R, D), B (E, R), b (E,), d (R,). `mask` has the shape of x. It holds 0
    or 1 / (1 - p) for a dropout with probability p, or is None without dropout. All tensors have the same dtype:
    float32, bfloat16 or float16. A and B are frozen, and may be slices of larger matrices. The result is differentiable
    once, with respect to x, b and d. Raises ValueError for wrong shapes or dtypes, and if W or bias requires a
    gradient.
    """
    checked(x, W, A, B, mask, bias=bias, b=b, d=d)
    y: Tensor = _VeraLinear.apply(matrix(x), W, contiguous(bias), A, B, b.contiguous(), d.contiguous(), matrix(mask))
    return y.view(*x.shape[:-1], len(W))
