"""LoRA linear, vectorised in torch: y = base(x) + s (x A^T) B^T with no temporary of the size of y but y itself.

Against the plain expression it saves, forward, the product (.., E) and its scaled copy, since the low-rank term is added
into base(x) by one addmm; and backward, the scaled copy of dy. S = x A^T (tokens x rank) is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _LowRankUpdate(torch.autograd.Function):
    """base_out + s (x A^T) B^T, written into base_out's memory if `in_place`.

    x (T, D), A (R, D), B (E, R), base_out (T, E); all of one dtype.
    """

    @staticmethod
    def forward(ctx: Any, base_out: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, in_place: bool) -> Tensor:
        S = x @ A.T
        ctx.save_for_backward(x, A, B, S)
        ctx.scaling = scaling
        if not in_place:
            return torch.addmm(base_out, S, B.T, alpha=scaling)
        ctx.mark_dirty(base_out)
        return base_out.addmm_(S, B.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, S = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():  # a second derivative is wanted, and S was kept as a mere number
            S = x @ A.T
        dS = (dy @ B).mul_(ctx.scaling)
        dx = dS @ A if need_x else None
        dA = dS.T @ x if need_A else None
        dB = (dy.T @ S).mul_(ctx.scaling) if need_B else None
        return dy, dx, dA, dB, None, None


def lora_linear(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return base(x) + scaling x A^T B^T, shape (..., E), for x (..., D), A (R, D), B (E, R), all of one dtype.

    Differentiable in x, A and B, and through `base`, twice too. The output of `base` is overwritten where nobody else
    can hold it: `base` is an nn.Linear without forward hooks of its own. Any other base may return its input, something
    it keeps, or (bitsandbytes) a view that autograd lets nobody write into, so its output is left alone. Under autocast
    and torch.compile the plain expression is used.
    """
    base_out: Tensor = base(x)
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return base_out + scaling * ((x @ A.T) @ B.T)
    in_place = type(base) is nn.Linear and not base._forward_hooks
    shape = base_out.shape
    rows = base_out.reshape(-1, shape[-1])
    out: Tensor = _LowRankUpdate.apply(rows, x.reshape(-1, x.shape[-1]), A, B, scaling, in_place)
    return out.view(shape)
