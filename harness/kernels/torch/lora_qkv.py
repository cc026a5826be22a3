"""Query, key and value layers with LoRA or DoRA on one input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from harness.kernels.torch.dora_linear import dora_linear
from harness.kernels.torch.lora_linears import LoraFactors, lora_linears
from harness.kernels.torch.support.autocast import cast_by_autocast


def adapted_linears(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ms: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Return x W^T + bias + scaling (x A^T) B^T, shape (..., E), for each layer, or DoRA's output if `ms` is given.

    Each list has one item per layer: W (E, D), bias (E,) or None, A (R, D), B (E, R), m (E,). x is (..., D). All
    tensors have one dtype, or get it from autocast. If `ms` is None, `lora_linears` computes all layers together.
    """
    own: Sequence[Tensor | None] = [None] * len(Ws) if biases is None else biases
    if ms is None:
        return _lora_linears(x, Ws, own, As, Bs, scalings)
    return [dora_linear(x, *one) for one in zip(Ws, own, As, Bs, ms, scalings, strict=True)]


@cast_by_autocast
def _lora_linears(
    x: Tensor, Ws: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    return lora_linears(x, [LoraFactors(*one) for one in zip(Ws, biases, As, Bs, scalings, strict=True)])


def lora_qkv(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Return the outputs (q, k, v), each (..., E). The arguments are those of `adapted_linears`."""
    return tuple(adapted_linears(x, Ws, biases, As, Bs, scalings, ms))
