"""A layer of the reference as a function of its tensors, for Operations that compute a layer's forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.conformance.operation import Arguments, draw


class Masked(nn.Module):
    """Dropout by a given mask of the shape of x, with elements 0 or 1 / (1 - p). Without a mask, nothing is dropped."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the mask."""
        return x if self.mask is None else x * self.mask


def apply_layer(layer: nn.Module, x: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return layer(x), computed with `tensors` instead of the layer's own tensors and with `mask` instead of its dropout.

    Gradients reach `tensors`. The layer's own tensors are leaves, which would pass no gradients on.
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
) -> Arguments:
    """Draw the inputs of a linear layer with dropout: x (*rows, D), bias (E,) or None, mask (like x) or None.

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
    """Draw A (R, D) and B (E, R), neither of them zero. If x is noise of size 1, so is B A x."""
    E, D = shape
    return {
        "A": draw(generator, dtype, rank, D, spread=D**-0.5),
        "B": draw(generator, dtype, E, rank, spread=rank**-0.5),
    }
