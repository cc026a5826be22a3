"""LoRA linear, vectorised in torch: y = base(x) + s (x A^T) B^T with no temporary of the size of y but y itself.

Against the plain expression it saves, forward, the product (.., E) and its scaled copy, since the low-rank term is added
into base(x) by one addmm; and backward, the scaled copy of dy. S = x A^T (tokens x rank) is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _LowRankUpdate(torch.autograd.Function):
    """base_out + s (x A^T) B^T, written into base_out's memory.

    x (T, D), A (R, D), B (E, R), base_out (T, E); all of one dtype.
    """

    @staticmethod
    def forward(ctx: Any, base_out: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        S = x @ A.T
        ctx.save_for_backward(x, A, B, S)
        ctx.scaling = scaling
        ctx.mark_dirty(base_out)
        return base_out.addmm_(S, B.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, S = ctx.saved_tensors
        _, need_x, need_A, need_B, _ = ctx.needs_input_grad
        dS = (dy @ B).mul_(ctx.scaling)
        dx = dS @ A if need_x else None
        dA = dS.T @ x if need_A else None
        dB = (dy.T @ S).mul_(ctx.scaling) if need_B else None
        return dy, dx, dA, dB, None


def lora_linear(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return base(x) + scaling x A^T B^T, shape (..., E), for x (..., D), A (R, D), B (E, R).

    Differentiable once in x, A and B, and through `base` in x. The output of `base` is overwritten, so `base` must
    return a fresh tensor, as linear layers do.
    """
    base_out = base(x)
    shape = base_out.shape
    out = _LowRankUpdate.apply(base_out.reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1]), A, B, scaling)
    return out.view(shape)  # type: ignore[no-any-return]


class FusedLoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update, computed by `lora_linear`. A (R, D), B (E, R)."""

    def __init__(self, base: nn.Module, A: nn.Parameter, B: nn.Parameter, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base, self.A, self.B = base, A, B
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) + scaling B A x; dropout acts on the adapter's input only."""
        if self.dropout and self.training:
            dropped = nn.functional.dropout(x, self.dropout)
            return self.base(x) + self.scaling * ((dropped @ self.A.T) @ self.B.T)  # type: ignore[no-any-return]
        return lora_linear(self.base, x, self.A, self.B, self.scaling)

    def delta(self) -> Tensor:
        """Return scaling B A, shape (E, D): what merging adds to the base weight."""
        return self.scaling * (self.B @ self.A)
