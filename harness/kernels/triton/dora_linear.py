"""DoRA's linear layer on a GPU. One kernel adds LoRA's update to the product with W and multiplies by the gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.kernels.torch.support.autocast import once_outside_autocast
from harness.kernels.triton.support.dora_dropout import dropped_backward, dropped_forward
from harness.kernels.triton.support.dora_gain import dora_gain
from harness.kernels.triton.support.low_rank_arguments import checked, contiguous, matrix
from harness.kernels.triton.support.low_rank_gemm import low_rank_gemm
from harness.kernels.triton.support.shrink import shrink
from harness.kernels.triton.support.token_sums import outer_sum, product_sum


class _DoraLinear(torch.autograd.Function):
    """Autograd function for a DoRA layer.

    The forward pass saves q = (x mask) W^T + scaling S B^T for the gradient of m, where S is (x mask) A^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        m: Tensor,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        gain, norm = dora_gain(W, A, B, m, scaling)
        S = shrink(x, A.T, mask=mask)
        if mask is None:
            q = torch.empty((len(x), len(W)), dtype=x.dtype, device=x.device) if ctx.needs_input_grad[5] else None
            y = low_rank_gemm(x, W.T, S, B.T, scale=scaling, gain=gain, bias=bias, product=q)
        else:
            y, q = dropped_forward(x, W, bias, B, S, scaling, mask, gain - 1)
        ctx.save_for_backward(x, W, A, B, S, q if ctx.needs_input_grad[5] else None, gain, norm, mask)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, S, q, gain, norm, mask = ctx.saved_tensors
        need_x, need_A, need_B, need_m = (ctx.needs_input_grad[at] for at in (0, 3, 4, 5))
        dx = dA = dB = dm = None
        if need_x or need_A:
            dS = shrink(dy, (gain[:, None] * B).to(B.dtype), scale=ctx.scaling)
            if need_x and mask is None:
                dx = low_rank_gemm(dy, W, dS, A, left_scale=gain)
            elif need_x:
                dx = dropped_backward(dy, W, A, dS, mask, gain - 1)
            dA = outer_sum(x, dS, mask=mask).T.to(A.dtype) if need_A else None
        if need_B:
            dB = (ctx.scaling * gain[:, None] * outer_sum(dy, S)).to(B.dtype)
        if need_m:
            dm = torch.where(norm > 0, product_sum(dy, q) / norm, 0.0).to(norm.dtype)
        return dx, None, None, dA, dB, dm, None, None


def dora_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """Return x W^T + bias + (g - 1) (x mask) W^T + g scaling ((x mask) A^T) B^T, shape (..., E).

    The gain g of an output is m / ||row of W + scaling B A||, or 0 where this norm is 0 (DoRA, arXiv:2402.09353,
    section 4.3). The norm is a constant in the backward pass. Dropout does not affect the first term, x W^T. Without a
    mask, the result is g (x W^T + scaling (x A^T) B^T) + bias. Shapes: x (..., D), W (E, D), bias (E,) or None, A (R,
    D), B (E, R), m (E,). mask: None, or a tensor in the shape of x with the values 0 and 1 / (1 - p). All tensors have
    one dtype: float32, bfloat16 or float16. The result is differentiable once, in x, A, B and m. Raises ValueError for
    wrong shapes or dtypes, and if W or bias requires a gradient.
    """
    checked(x, W, A, B, mask, bias=bias, m=m)
    y: Tensor = _DoraLinear.apply(matrix(x), W, contiguous(bias), A, B, m.contiguous(), scaling, matrix(mask))
    return y.view(*x.shape[:-1], len(W))
