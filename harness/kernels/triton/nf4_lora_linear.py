"""LoRA on a weight in NF4 (QLoRA, arXiv:2305.14314) on a GPU: decode the weight, then use `lora_linear`.

A product that decodes while multiplying is slower at training sizes, because every tile of tokens would decode the
weight again. The backward pass decodes the weight, too: saving the decoded weight would take the memory that packing
saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.kernels.torch.support.autocast import once_outside_autocast
from harness.kernels.triton import lora_linear, nf4
from harness.kernels.triton.support.low_rank_arguments import checked, contiguous, matrix

Packed = tuple[Tensor, Tensor, int, Sequence[int]]
"""A packed weight: the packed bytes, the absmax, the size of a block and the shape (E, D)."""


class _Nf4LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Packed,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        y, S = lora_linear.forward(x, nf4.dequantize(*weight, x.dtype), bias, A, B, scaling, mask)
        packed, absmax, *ctx.layout = weight
        ctx.save_for_backward(x, packed, absmax, A, B, S, mask)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, absmax, A, B, S, mask = ctx.saved_tensors
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        block, shape = ctx.layout
        W = nf4.dequantize(packed, absmax, block, shape, x.dtype) if need_x else None
        dx, dA, dB = lora_linear.backward(dy, x, W, A, B, S, ctx.scaling, mask, (need_x, need_A, need_B))
        return dx, None, None, dA, dB, None, None


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
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, shape (..., E) (QLoRA's eq. 5), for a packed W.

    packed, absmax, block: W (E, D) as packed by `nf4.quantize`. shape: (E, D). W is decoded to the dtype of x. The
    other arguments are those of `lora_linear`. Raises ValueError as `lora_linear` and `nf4.dequantize` do.
    """
    checked(x, shape, A, B, mask, bias=bias)
    weight = packed, absmax, block, tuple(shape)
    y: Tensor = _Nf4LoraLinear.apply(matrix(x), weight, contiguous(bias), A, B, scaling, matrix(mask))
    return y.view(*x.shape[:-1], shape[0])
