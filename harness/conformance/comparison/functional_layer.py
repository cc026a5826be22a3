"""Layer of the reference as a function of its tensors, for Operations that are a layer's forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.conformance.operation import Arguments, draw


class Masked(nn.Module):
    """Dropout by a mask that is given: 0 or 1 / (1 - p), of the shape of x; None drops nothing."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the features of the mask dropped."""
        return x if self.mask is None else x * self.mask


def apply_layer(layer: nn.Module, x: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return layer(x) with `tensors` in place of the layer's own, and `mask` in place of its dropout.

    Gradients reach `tensors`; the layer's own are leaves, which would pass none on.
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
    """Draw the inputs of such a layer: x (*rows, D), bias (E,) or None, mask (like x) or None.

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
    """Draw A (R, D) and B (E, R), neither of them zero. For noise of size 1, B A gives noise of size 1."""
    E, D = shape
    return {
        "A": draw(generator, dtype, rank, D, spread=D**-0.5),
        "B": draw(generator, dtype, E, rank, spread=rank**-0.5),
    }
