"""LoRA on packed NF4 (QLoRA, arXiv:2305.14314): decode the weight, multiply, and add the low-rank term in place.

The backward pass decodes the weight again. It uses the saved x, mask, A, B and S = (x mask) A^T. Shapes: T tokens, D
inputs, E outputs, R the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.kernels.crossover import is_lora_fused
from harness.kernels.device import frozen, multiplied_by_triton
from harness.kernels.torch import nf4
from harness.kernels.torch.nf4_linear import product
from harness.kernels.torch.support.autocast import outside_autocast
from harness.kernels.torch.support.packed_weight import PackedWeight


class _LoraProduct(torch.autograd.Function):
    """The function x W^T + bias + scaling ((x mask) A^T) B^T for x, mask (T, D), W (E, D), A (R, D) and B (E, R).

    All tensors have the same dtype after W is decoded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        weight: PackedWeight,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.scaling = weight, scaling
        S = (x if mask is None else x * mask) @ A.T
        ctx.save_for_backward(x, A, B, S, mask)
        return product(x, weight, bias).addmm_(S, B.T, alpha=scaling)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, S, mask = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        masked = x if mask is None or not (need_A or torch.is_grad_enabled()) else x * mask
        if torch.is_grad_enabled():  # for a second derivative S needs its graph
            S = masked @ A.T
        dS = (dy @ B).mul_(ctx.scaling) if need_x or need_A else dy
        dx = None
        if need_x:
            dx = product(dy, ctx.weight, transposed=True)
            dx = dx.addmm_(dS, A) if mask is None else dx.addcmul_(dS @ A, mask)
        dA = dS.T @ masked if need_A else None
        dB = (dy.T @ S).mul_(ctx.scaling) if need_B else None
        return dx, dA, dB, dy.sum(dim=0) if need_bias else None, None, None, None


def packed_lora_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, shape (..., E), with W decoded and cast to the dtype of x.

    Shapes: x (..., D), A (R, D), B (E, R), all of one dtype. mask: None, or dropout's tensor in the shape of x, with
    the values 0 and 1 / (1 - p). The result is differentiable in x, A, B and bias: twice in torch, once in Triton,
    where a second derivative raises RuntimeError. Without a mask, Triton computes the call up to the crossover rank of
    `lora_linear`; see `harness.kernels.crossover`. Under autocast and under torch.compile, the weight is decoded first,
    and plain torch operations multiply.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        masked = x if mask is None else x * mask
        return linear(x, weight.decoded(x.dtype), bias) + scaling * ((masked @ A.T) @ B.T)
    by_triton = multiplied_by_triton(x, A, B, weight.packed) and nf4.triton_block(weight.block) and frozen(bias)
    if by_triton and is_lora_fused(len(A), weight.shape[0], mask, x.device):
        from harness.kernels.triton import nf4_lora_linear as gpu

        packed = weight.packed, weight.constants(), weight.block, weight.shape
        return gpu.nf4_lora_linear(x, *packed, bias, A, B, scaling, mask)
    rows, mask_rows = x.reshape(-1, x.shape[-1]), None if mask is None else mask.reshape(-1, x.shape[-1])
    y: Tensor = _LoraProduct.apply(rows, A, B, bias, weight, scaling, mask_rows)
    return y.view(*x.shape[:-1], y.shape[-1])


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    block: int,
    shape: Sequence[int],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T (QLoRA's eq. 5) for a packed W (E, D).

    packed, absmax, block: W as packed by `nf4.quantize`. shape: (E, D). The other arguments are those of
    `packed_lora_linear`. Raises ValueError if the length of `packed` or `absmax` does not fit `shape`.
    """
    E, D = shape
    return packed_lora_linear(x, PackedWeight(packed, absmax, block, (E, D)), bias, A, B, scaling, mask)
