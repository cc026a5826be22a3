"""A layer of the reference as a function of its tensors: for the Operations that are a layer's forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.operation import draw


class Masked(nn.Module):
    """Dropout by a mask that is given: 0 or 1 / (1 - p), of the shape of x; None drops nothing."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the features of the mask dropped."""
        return x if self.mask is None else x * self.mask


def apply_layer(layer: nn.Module, x: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return layer(x) with `tensors` in the place of the layer's own, and `mask` in that of its dropout.

    The layer's own are parameters, leaves that pass no gradient on: to these it does.
    """
    layer.dropout = Masked(mask)
    y: Tensor = torch.func.functional_call(layer, dict(tensors), (x,))
    return y


def dense_linear(W: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return the frozen linear layer of W (E, D) and bias (E,)."""
    base = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None, device="meta")
    base.weight = nn.Parameter(W, requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
    return base


def draw_inputs(
    dtype: torch.dtype,
    generator: torch.Generator,
    shape: Sequence[int],
    rows: Sequence[int],
    *,
    bias: bool,
    dropout: float,
) -> dict[str, Any]:
    """Draw what every such layer gets beside its weights: x (*rows, D), bias (E,) or None, mask as x or None.

    shape: (E, D). dropout: the probability that an element of x is dropped; 0 gives no mask.
    """
    E, D = shape
    x = draw(generator, dtype, *rows, D)
    kept = torch.rand(x.shape, generator=generator, dtype=torch.float64) >= dropout
    return {
        "x": x,
        "bias": draw(generator, dtype, E) if bias else None,
        "mask": (kept / (1 - dropout)).to(dtype) if dropout else None,
    }


def draw_low_rank(dtype: torch.dtype, generator: torch.Generator, shape: Sequence[int], rank: int) -> dict[str, Tensor]:
    """Draw A (R, D) and B (E, R), neither of them zero: of noise of size 1, B A makes noise of size 1."""
    E, D = shape
    return {
        "A": draw(generator, dtype, rank, D, spread=D**-0.5),
        "B": draw(generator, dtype, E, rank, spread=rank**-0.5),
    }
