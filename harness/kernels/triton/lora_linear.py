"""LoRA's linear layer on a GPU.

In both passes, the kernel adds the low-rank update to the product with the frozen weight. Compared with the layer
without LoRA, the forward pass reads x one more time. The backward pass reads x one more time and dy two more times. The
only new tensor of y's size is y. The backward pass uses the saved S = (x mask) A^T, of shape (tokens, rank).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.kernels.torch.support.autocast import once_outside_autocast
from harness.kernels.triton.support.low_rank_arguments import checked, contiguous, matrix
from harness.kernels.triton.support.low_rank_gemm import low_rank_gemm
from harness.kernels.triton.support.shrink import shrink
from harness.kernels.triton.support.token_sums import outer_sum

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (y, S) with y = x W^T + bias + scaling S B^T, shape (T, E), and S = (x mask) A^T, shape (T, R).

    x and mask are (T, D).
    """
    S = shrink(x, A.T, mask=mask)
    return low_rank_gemm(x, W.T, S, B.T, scale=scaling, bias=bias), S


def backward(
    dy: Tensor,
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    scaling: float,
    mask: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> Gradients:
    """Return the gradients of x, A and B. A gradient that is not `needed` is None.

    dy is (T, E). S: as returned by `forward`. W may be None if the gradient of x is not needed.
    """
    need_x, need_A, need_B = needed
    dx = dA = dB = None
    if need_x or need_A:
        dS = shrink(dy, B, scale=scaling)
        dx = low_rank_gemm(dy, W, dS, A, term_mask=mask) if W is not None and need_x else None
        dA = outer_sum(x, dS, mask=mask).T.to(A.dtype) if need_A else None
    if need_B:
        dB = (scaling * outer_sum(dy, S)).to(B.dtype)
    return dx, dA, dB


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
    ) -> Tensor:
        y, S = forward(x, W, bias, A, B, scaling, mask)
        ctx.save_for_backward(x, W, A, B, S, mask)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, S, mask = ctx.saved_tensors
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        dx, dA, dB = backward(dy, x, W, A, B, S, ctx.scaling, mask, (need_x, need_A, need_B))
        return dx, None, None, dA, dB, None, None


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, shape (..., E) (LoRA, arXiv:2106.09685, eq. 3).

    Shapes: x (..., D), W (E, D), bias (E,) or None, A (R, D), B (E, R). mask: None, or a tensor in the shape of x with
    the values 0 and 1 / (1 - p). All tensors have one dtype: float32, bfloat16 or float16. The result is differentiable
    once, in x, A and B. Raises ValueError for wrong shapes or dtypes, and if W or bias requires a gradient.
    """
    checked(x, W, A, B, mask, bias=bias)
    y: Tensor = _LoraLinear.apply(matrix(x), W, contiguous(bias), A, B, scaling, matrix(mask))
    return y.view(*x.shape[:-1], len(W))
