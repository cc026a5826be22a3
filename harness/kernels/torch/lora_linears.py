"""Several LoRA linear layers with the same input x, such as q, k and v.

x is read once for the low-rank products of all layers, and one tensor accumulates the gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.kernels.device import frozen, multiplied_by_triton
from harness.kernels.torch.lora_linear import is_plain
from harness.kernels.torch.nf4_linear import Nf4Linear, product
from harness.kernels.torch.support.autocast import outside_autocast
from harness.kernels.torch.support.packed_weight import PackedWeight


@dataclass(frozen=True)
class LoraFactors:
    """Factors of one layer, y = x W^T + bias + scaling (x A^T) B^T."""

    W: Tensor | PackedWeight
    """Weight of the base layer, (E, D), dense or in NF4."""
    bias: Tensor | None
    """Bias of the base layer, (E,). None for a layer without bias."""
    A: Tensor
    """LoRA's A, (R, D)."""
    B: Tensor
    """LoRA's B, (E, R)."""
    scaling: float


class _LoraLinears(torch.autograd.Function):
    """Autograd function that computes all layers with one matrix `As`: the layers' matrices scaling * A, stacked.

    `As` is (ranks, D), where `ranks` is the sum of the layers' ranks. Each of S = x As^T, dx += dS As and dAs = dS^T x
    is then one product for all layers. Because `As` includes the scaling, no tensor with a row per token needs to be
    scaled. The backward pass uses the saved x and S (T, ranks).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[LoraFactors], precomputed: dict[Any, Any], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.precomputed = precomputed
        ctx.set_materialize_grads(False)  # the gradient of an unused output is None, not zeros
        As = _scaled(layers)
        S = x @ As.T
        ctx.layers = [(one.W if isinstance(one.W, PackedWeight) else None, one.scaling) for one in layers]
        ctx.save_for_backward(x, S, As, *factors)
        outputs = []
        for one, low in zip(layers, S.split([len(one.A) for one in layers], dim=1), strict=True):
            y = _product(x, one.W, transposed=False)
            if one.bias is not None:
                y += one.bias
            outputs.append(y.addmm_(low, one.B.T))
        return tuple(outputs)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        ctx.precomputed.clear()
        try:
            x, S, As, *factors = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                f"second backward pass through {len(ctx.layers)} LoRA layers that were computed by one call, such as q, k "
                "and v; the first pass freed the saved tensors. hint: call backward once, on the sum of the losses, or with "
                "retain_graph=True"
            ) from error
        layers = [
            LoraFactors(factors[at] if packed is None else packed, None, factors[at + 2], factors[at + 3], scaling)
            for at, (packed, scaling) in zip(range(0, len(factors), 4), ctx.layers, strict=True)
        ]
        if torch.is_grad_enabled():  # for a second derivative these need their graph
            As = _scaled(layers)
            S = x @ As.T
        used = {at: dy for at, dy in enumerate(dys) if dy is not None}
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        ranks = [len(one.A) for one in layers]
        if len(used) < len(layers):
            As = torch.cat([As.split(ranks)[at] for at in used])
        dS = torch.cat([dy @ layers[at].B for at, dy in used.items()], dim=1)
        dx = None
        if ctx.needs_input_grad[0]:
            for at, dy in used.items():
                dx = _product(dy, layers[at].W, transposed=True, onto=dx)
            dx = dx.addmm_(dS, As) if dx is not None else None
        needed = ctx.needs_input_grad[3:]
        gradients: list[Tensor | None] = [None] * len(factors)
        dAs: Sequence[Any] = (dS.T @ x).split([ranks[at] for at in used]) if any(needed[2::4]) else [None] * len(used)
        # On a CPU, lows @ dy with contiguous lows takes two thirds of the time of dy.T @ S.
        lows = S.T.contiguous().split(ranks)
        for (at, dy), dA in zip(used.items(), dAs, strict=True):
            need_W, need_bias, need_A, need_B = needed[4 * at : 4 * at + 4]
            gradients[4 * at : 4 * at + 4] = [
                dy.T @ x if need_W else None,
                dy.sum(0) if need_bias else None,
                dA * layers[at].scaling if need_A else None,
                (lows[at] @ dy).T if need_B else None,
            ]
        return dx, None, None, *gradients


def _scaled(layers: Sequence[LoraFactors]) -> Tensor:
    """Return scaling * A of every layer, stacked along the rows, (sum of the ranks, D)."""
    return torch.cat([one.A if one.scaling == 1 else one.A * one.scaling for one in layers])


def _product(x: Tensor, W: Tensor | PackedWeight, *, transposed: bool, onto: Tensor | None = None) -> Tensor:
    """Return x W^T, or x W if `transposed`.

    If `onto` is given, add the product to onto, in place where possible, and return the sum.
    """
    if isinstance(W, PackedWeight):
        if torch.is_grad_enabled():
            y = product(x, W, transposed=transposed)
            return y if onto is None else onto + y
        W = W.in_buffer(x.dtype)
    right = W if transposed else W.T
    return x @ right if onto is None else onto.addmm_(x, right)


def lora_linears(x: Tensor, layers: Sequence[LoraFactors], precomputed: dict[Any, Any] | None = None) -> list[Tensor]:
    """Return x W^T + bias + scaling (x A^T) B^T, shape (..., E), for each layer.

    x is (..., D). All tensors have one dtype. The results are differentiable in x, bias, A, B and every dense W: twice
    in torch, once in Triton. All outputs belong to one node of the graph: a backward pass through one output frees the
    saved tensors of all. precomputed: dict in which the caller keeps outputs for later use. The backward pass clears
    this dict, because outputs without saved tensors are useless.
    """
    precomputed = {} if precomputed is None else precomputed
    dense = [(one.W, one.bias, one.A, one.B, one.scaling) for one in layers if isinstance(one.W, Tensor)]
    tensors = [t for W, _, A, B, _ in dense for t in (W, A, B)]
    if len(dense) == len(layers) and multiplied_by_triton(x, *tensors) and all(frozen(*one[:2]) for one in dense):
        from harness.kernels.triton import lora_linears as gpu

        return gpu.lora_linears(x, dense, precomputed)
    factors: list[Tensor | None] = []
    for one in layers:
        factors += [None if isinstance(one.W, PackedWeight) else one.W, one.bias, one.A, one.B]
    outputs = _LoraLinears.apply(x.reshape(-1, x.shape[-1]), tuple(layers), precomputed, *factors)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def factors_over(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> LoraFactors | None:
    """Return the factors of a LoRA layer on `base` for `lora_linears`, or None if the layer must be computed alone.

    The result is None under autocast and under torch.compile. It is None if the base has hooks, is neither an nn.Linear
    nor an `Nf4Linear`, or differs in dtype from x, A or B. It is also None if the base is in NF4 and Triton multiplies,
    because Triton's kernel for NF4 (`nf4_lora_linear`) computes a single layer.
    """
    inner: Any = base
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return None
    if is_plain(base) and {inner.weight.dtype, A.dtype, B.dtype} == {x.dtype}:
        return LoraFactors(inner.weight, inner.bias, A, B, scaling)
    if multiplied_by_triton(x, A, B):
        return None
    if is_plain(base, Nf4Linear) and x.dtype == inner.compute_dtype == A.dtype == B.dtype:
        return LoraFactors(inner.packed_weight, None if inner.bias is None else inner.bias.to(x.dtype), A, B, scaling)
    return None
