"""DoRA linear layer (arXiv:2402.09353): LoRA's output before the bias, multiplied by one gain per output feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.kernels.device import frozen, multiplied_by_triton
from harness.kernels.torch.lora_linear import lora_linear
from harness.kernels.torch.support.autocast import outside_autocast


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return the norm of each row of W + scaling B A, shape (E,), without a gradient (arXiv:2402.09353, section 4.3).

    The function computes the sum W + scaling B A itself, instead of combining the norms of W and B A. On a CPU this
    takes a third longer, but is accurate where W and B A cancel each other. Autocast does not reduce the precision.
    """
    dtype = torch.promote_types(W.dtype, B.dtype)  # under autocast, a base in 16 bits may have an adapter in float32
    with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
        V = torch.addmm(W.to(dtype), B.to(dtype), A.to(dtype), alpha=scaling)
        norm: Tensor = torch.linalg.vector_norm(V, dim=1)
    return norm


class _Gained(torch.autograd.Function):
    """Autograd function for z (m / norm) + onto, where z is (T, E), and onto is (E,), (T, E) or None.

    The backward pass uses the saved z, m and norm.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, onto: Tensor | None, m: Tensor, norm: Tensor) -> Tensor:
        ctx.save_for_backward(z, m, norm)
        ctx.summed = onto is not None and onto.dim() == 1
        g = _over(m, norm)
        return z * g if onto is None else torch.addcmul(onto, z, g)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, m, norm = ctx.saved_tensors
        need_z, need_onto, need_m = ctx.needs_input_grad[:3]
        product = dy * z if need_m else None
        dm = None if product is None else _over(product.sum(0), norm)
        # Reuse memory: fresh memory of this size costs as much as the product.
        reused = None if torch.is_grad_enabled() else product
        return (
            torch.mul(dy, _over(m, norm), out=reused) if need_z else None,
            (dy.sum(0) if ctx.summed else dy) if need_onto else None,
            dm,
            None,
        )


def gained(z: Tensor, onto: Tensor | None, m: Tensor, norm: Tensor) -> Tensor:
    """Return (m / norm) z + onto, shape (..., E). The gain m / norm is 0 where the norm is 0.

    Shapes: z (..., E), m and norm (E,). onto: (E,), or in the shape of z, or None for no summand. The result is
    differentiable in z, onto and m.
    """
    flat = onto if onto is None or onto.dim() == 1 else onto.reshape(-1, onto.shape[-1])
    y: Tensor = _Gained.apply(z.reshape(-1, z.shape[-1]), flat, m, norm)
    return y.view(z.shape)


def _over(numerator: Tensor, norm: Tensor) -> Tensor:
    """Return numerator / norm, and 0 where the norm is 0."""
    positive = norm > 0
    return torch.where(positive, numerator, 0.0) / torch.where(positive, norm, 1.0)


def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias + (g - 1) (x mask) W^T + g scaling ((x mask) A^T) B^T, shape (..., E).

    This is eq. 5 of arXiv:2402.09353 with dropout. The gain g of an output is m / ||row of W + scaling B A||, or 0
    where this norm is 0. Shapes: x (..., D), W (E, D), bias (E,), A (R, D), B (E, R), m (E,). mask has the shape of x,
    or is None. All tensors have one dtype. Under autocast, the products have autocast's dtype, and the norm, the gain
    and the result have the dtype of m.

    The result is differentiable in all tensors but the mask: twice in torch, once in Triton, where a second derivative
    raises RuntimeError. Derivatives treat the norm as a constant.
    """
    if multiplied_by_triton(x, W, A, B, m) and frozen(W, bias):
        from harness.kernels.triton import dora_linear as gpu

        return gpu.dora_linear(x, W, bias, A, B, m, scaling, mask)
    norm = row_norms(W, A, B, scaling)
    if mask is None:
        return gained(lora_linear(x, W, None, A, B, scaling), bias, m, norm)
    # The gain scales only the products with `dropped`. Those of W and of B A are one sum, in which they may cancel.
    dropped = x * mask
    return gained(lora_linear(dropped, W, None, A, B, scaling), linear(x - dropped, W, bias), m, norm)
