"""DoRA linear: one large product that carries the low-rank term, then a gain for each output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.kernels.device import by_triton, frozen


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return ||W + scaling B A|| of every row, shape (E,) (arXiv:2402.09353, section 4).

    The sum is made, not the norms of its parts put together: on a CPU that is one thin product either way, and this one
    holds its digits where the parts cancel.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.addmm(W, B, A, alpha=scaling), dim=1)
    return norm


class _DoraLinear(torch.autograd.Function):
    """y = g z + bias, z = x W^T + s S B^T, S = x A^T, g = m / norm; the norm is a constant (section 4.3).

    With a mask z is that of x mask, and (x - x mask) W^T, which no gain scales, is added. Kept: x, S and z (T, E).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        norm = row_norms(W, A, B, scaling)
        dropped = x if mask is None else x * mask
        S = dropped @ A.T
        z = (dropped @ W.T).addmm_(S, B.T, alpha=scaling)
        ctx.save_for_backward(x, W, A, B, m, S, z, norm, mask)
        ctx.scaling = scaling
        g = _over(m, norm)
        if mask is None:
            return z * g if bias is None else torch.addcmul(bias, z, g)
        spared = x - dropped
        y = spared @ W.T if bias is None else torch.addmm(bias, spared, W.T)
        return y.addcmul_(z, g)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, m, S, z, norm, mask = ctx.saved_tensors
        need_x, need_W, need_bias, need_A, need_B, need_m = ctx.needs_input_grad[:6]
        if need_W:
            raise RuntimeError("dora_linear: the base weight is frozen in DoRA, and it requires a gradient here")
        dropped = x if mask is None else x * mask
        if torch.is_grad_enabled():  # a second derivative is wanted, and S and z were kept as mere numbers
            S = dropped @ A.T
            z = dropped @ W.T + ctx.scaling * (S @ B.T)
        dz = dy * _over(m, norm)
        dS = (dz @ B).mul_(ctx.scaling)
        dx = None
        if need_x:
            dx = (dz @ W).addmm_(dS, A)
            if mask is not None:
                dx = dx * mask + (dy @ W) * (1 - mask)
        return (
            dx,
            None,
            dy.sum(0) if need_bias else None,
            dS.T @ dropped if need_A else None,
            ((S.T.contiguous() * ctx.scaling) @ dz).T if need_B else None,
            _over((dy * z).sum(0), norm) if need_m else None,
            None,
            None,
        )


def _over(numerator: Tensor, norm: Tensor) -> Tensor:
    """Return numerator / norm, and 0 where the norm is 0."""
    some = norm > 0
    return torch.where(some, numerator, 0.0) / torch.where(some, norm, 1.0)


def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias + (g - 1) (x mask) W^T + g scaling ((x mask) A^T) B^T, shape (..., E) (eq. 5 with dropout).

    g = m / ||W + scaling B A|| of each row, 0 where that is 0. x (..., D), W (E, D), bias (E,), A (R, D), B (E, R), m (E,),
    mask like x or None, all of one dtype. Differentiable in x, bias, A, B and m, with the norm as a constant. Raises
    RuntimeError in the backward pass if W requires a gradient.
    """
    if by_triton(x, W, A, B, m) and frozen(W, bias):
        from harness.kernels.gpu import dora_linear as gpu

        return gpu.dora_linear(x, W, bias, A, B, m, scaling, mask)
    rows = None if mask is None else mask.reshape(-1, x.shape[-1])
    y: Tensor = _DoraLinear.apply(x.reshape(-1, x.shape[-1]), W, bias, A, B, m, scaling, rows)
    return y.view(*x.shape[:-1], len(W))
