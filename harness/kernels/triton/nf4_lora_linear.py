"""LoRA on a weight in NF4 (QLoRA, arXiv:2305.14314) on a GPU: decode the weight once per pass, then as `lora_linear`.

A product that decodes while multiplying is slower at training sizes, since every tile of tokens would decode the weight
again. The decoded weight is not saved for the backward pass, which decodes it again: that is the memory that packing saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from harness.kernels.torch.support.autocast import outside_autocast
from harness.kernels.triton import lora_linear, nf4
from harness.kernels.triton.support.low_rank_arguments import checked, contiguous, matrix


class _Nf4LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        W = nf4.dequantize(packed, absmax, block, shape, x.dtype)
        y, S = lora_linear.forward(x, W, bias, A, B, scaling, mask)
        ctx.save_for_backward(x, packed, absmax, A, B, S, mask)
        ctx.block, ctx.shape, ctx.scaling = block, shape, scaling
        return y

    @staticmethod
    @outside_autocast
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, absmax, A, B, S, mask = ctx.saved_tensors
        need_x, need_A, need_B = (ctx.needs_input_grad[at] for at in (0, 6, 7))
        W = nf4.dequantize(packed, absmax, ctx.block, ctx.shape, x.dtype) if need_x else None
        dx, dA, dB = lora_linear.backward(dy, x, W, A, B, S, ctx.scaling, mask, (need_x, need_A, need_B))
        return dx, None, None, None, None, None, dA, dB, None, None


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
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, shape (..., E), with W decoded to the dtype of x. QLoRA, eq. 5.

    packed, absmax, block, shape = (E, D): as `nf4.quantize` packs W. Other arguments as for `lora_linear`. Raises ValueError
    as `lora_linear` and `nf4.dequantize` do.
    """
    checked(x, shape, A, B, mask, bias=bias)
    dropped = None if mask is None else matrix(mask)
    y: Tensor = _Nf4LoraLinear.apply(
        matrix(x), packed, absmax, block, tuple(shape), contiguous(bias), A, B, scaling, dropped
    )
    return y.view(*x.shape[:-1], shape[0])
