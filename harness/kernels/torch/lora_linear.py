"""LoRA linear layer, y = x W^T + bias + scaling ((x mask) A^T) B^T.

Low-rank terms are added to the large products in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

from harness.kernels.crossover import is_lora_fused
from harness.kernels.device import frozen, multiplied_by_triton
from harness.kernels.torch.nf4_linear import Nf4Linear
from harness.kernels.torch.nf4_lora_linear import packed_lora_linear
from harness.kernels.torch.support.autocast import cast_by_autocast, outside_autocast


class _LoraLinear(torch.autograd.Function):
    """Autograd function for a LoRA layer. In both passes, addmm adds the low-rank terms to the large products in place.

    The backward pass uses the saved x and S = (x mask) A^T, shape (T, R). Autograd on the same formula would allocate
    more: in the forward pass the update (T, E) and its scaled copy; in the backward pass a scaled copy of dy, and two
    gradients of x to be added.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
    ) -> Tensor:
        S = (x if mask is None else x * mask) @ A.T
        y = x @ W.T if bias is None else torch.addmm(bias, x, W.T)
        ctx.save_for_backward(x, W, A, B, S, mask)
        ctx.scaling = scaling
        return y.addmm_(S, B.T, alpha=scaling)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, S, mask = ctx.saved_tensors
        need_x, need_W, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        dropped = x if mask is None else x * mask if need_A or torch.is_grad_enabled() else None
        if torch.is_grad_enabled():  # for a second derivative S needs its graph
            S = dropped @ A.T
        dS = (dy @ B).mul_(ctx.scaling)
        dx = None
        if need_x:
            dx = (dy @ W).addmm_(dS, A) if mask is None else (dy @ W).addcmul_(dS @ A, mask)
        return (
            dx,
            dy.T @ x if need_W else None,
            dy.sum(0) if need_bias else None,
            dS.T @ dropped if need_A else None,
            # On a CPU, this takes two thirds of the time of dy.T @ S.
            ((S.T.contiguous() * ctx.scaling) @ dy).T if need_B else None,
            None,
            None,
        )


@cast_by_autocast
def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, shape (..., E) (arXiv:2106.09685, section 4.1).

    Shapes: x (..., D), W (E, D), bias (E,), A (R, D), B (E, R). mask has the shape of x, or is None. All tensors have
    one dtype, or get it from autocast. The result is differentiable in all tensors but the mask: twice in torch, once
    in Triton, where a second derivative raises RuntimeError. Without a mask, Triton computes only up to a rank that
    depends on the card; see `harness.kernels.crossover`.
    """
    if multiplied_by_triton(x, W, A, B) and frozen(W, bias) and is_lora_fused(len(A), len(W), mask, x.device):
        from harness.kernels.triton import lora_linear as gpu

        return gpu.lora_linear(x, W, bias, A, B, scaling, mask)
    return separate_products(x, W, bias, A, B, scaling, mask)


def separate_products(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Return the result of `lora_linear`, computed by torch on every device, with separate products for W, A and B."""
    rows = None if mask is None else mask.reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), W, bias, A, B, scaling, rows)
    return y.view(*x.shape[:-1], len(W))


def is_plain(base: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Return whether `base` has exactly the type `kind` and no hooks.

    If so, callers may use the weight of `base` without calling `base`.
    """
    hooked = (
        base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        or "forward" in base.__dict__ or _has_any_global_hook()
    )  # fmt: skip
    return type(base) is kind and not hooked


def lora_linear_over(
    base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Return base(x) + scaling ((x mask) A^T) B^T, shape (..., E).

    `lora_linear` computes the result if the base is an nn.Linear without hooks. `packed_lora_linear` computes it if the
    base is an `Nf4Linear` without hooks, x has the base's compute_dtype, and autocast is off. Any other base is called,
    and the low-rank term is added out of place, because base(x) may return x itself or a tensor that the base holds.
    Under torch.compile every base is called, because torch.compile then fuses better.
    """
    inner: Any = base
    if not torch.compiler.is_compiling():
        if is_plain(base):
            return lora_linear(x, inner.weight, inner.bias, A, B, scaling, mask)
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast and is_plain(base, Nf4Linear) and x.dtype == inner.compute_dtype:
            bias = None if inner.bias is None else inner.bias.to(x.dtype)
            return packed_lora_linear(x, inner.packed_weight, bias, A, B, scaling, mask)
    out: Tensor = base(x)
    return out + scaling * linear(linear(x if mask is None else x * mask, A), B)
