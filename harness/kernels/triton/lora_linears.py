"""Several LoRA linear layers with the same input x on a GPU.

In both passes, x is read once for the low-rank products of all layers. As in `lora_linear`, the kernel adds each
layer's update to the product with the layer's frozen weight. One tensor accumulates the gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.kernels.torch.support.autocast import once_outside_autocast
from harness.kernels.triton.support.low_rank_arguments import checked, contiguous, matrix
from harness.kernels.triton.support.low_rank_gemm import low_rank_gemm
from harness.kernels.triton.support.shrink import shrink
from harness.kernels.triton.support.token_sums import outer_sum

Layer = tuple[Tensor, Tensor | None, Tensor, Tensor, float]
"""One layer: the tensors W (E, D), bias (E,), A (R, D) and B (E, R), and the scaling."""


class _LoraLinears(torch.autograd.Function):
    """Autograd function that computes all layers. The forward pass saves x and S (T, ranks).

    S is x times the transpose of all A, stacked along the rows. `ranks` is the sum of the layers' ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: Sequence[float], precomputed: dict[Any, Any], *factors: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # the gradient of an unused output is None, not zeros
        Ws, biases, As, Bs = (factors[at::4] for at in range(4))
        S = shrink(x, torch.cat(As).T)
        ctx.precomputed, ctx.scalings, ctx.ranks = precomputed, scalings, [len(A) for A in As]
        ctx.save_for_backward(x, S, *Ws, *As, *Bs)
        each = zip(Ws, biases, S.split(ctx.ranks, dim=1), Bs, scalings, strict=True)
        return tuple(low_rank_gemm(x, W.T, low, B.T, scale=s, bias=bias) for W, bias, low, B, s in each)

    @staticmethod
    @once_outside_autocast
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        ctx.precomputed.clear()
        x, S, *rest = ctx.saved_tensors
        count = len(ctx.ranks)
        Ws, As, Bs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        used = {at: dy for at, dy in enumerate(dys) if dy is not None}
        needed = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * (4 * count)
        if not used:
            return None, None, None, *gradients
        dS = {at: shrink(dy, Bs[at], scale=ctx.scalings[at]) for at, dy in used.items()}
        dx = None
        if needed[0]:
            for at, dy in used.items():
                part = low_rank_gemm(dy, Ws[at], dS[at], As[at])
                dx = part if dx is None else dx.add_(part)
        if any(needed[3 + 4 * at + 2] for at in used):
            dAs = outer_sum(x, torch.cat(list(dS.values()), dim=1)).T.split([ctx.ranks[at] for at in used])
            for at, dA in zip(used, dAs, strict=True):
                gradients[4 * at + 2] = dA.to(x.dtype) if needed[3 + 4 * at + 2] else None
        lows = S.split(ctx.ranks, dim=1)
        for at, dy in used.items():
            if needed[3 + 4 * at + 3]:
                gradients[4 * at + 3] = (ctx.scalings[at] * outer_sum(dy, lows[at])).to(x.dtype)
        return dx, None, None, *gradients


def lora_linears(x: Tensor, layers: Sequence[Layer], precomputed: dict[Any, Any]) -> list[Tensor]:
    """Return x W^T + bias + scaling (x A^T) B^T, shape (..., E), for each layer.

    x is (..., D). All tensors have one dtype: float32, bfloat16 or float16. The results are differentiable once, in x
    and every A and B. All outputs belong to one node of the graph. precomputed: dict in which the caller keeps outputs
    for later use. The backward pass clears this dict, because outputs without saved tensors are useless. Raises
    ValueError for wrong shapes or dtypes, and if a W or a bias requires a gradient.
    """
    factors: list[Tensor | None] = []
    for W, bias, A, B, _ in layers:
        checked(x, W, A, B, None, bias=bias)
        factors += [W, contiguous(bias), A, B]
    outputs = _LoraLinears.apply(matrix(x), [scaling for *_, scaling in layers], precomputed, *factors)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]
