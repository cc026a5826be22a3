"""Run a layer of the reference as a function of its tensors.

Operations that compute the forward pass of a layer need this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.conformance.operation import Arguments, draw


class Masked(nn.Module):
    """Layer that multiplies by a given mask, in place of dropout.

    The mask has the shape of the input x. Its elements are 0 or 1 / (1 - p). Without a mask, nothing is dropped.
    """

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the mask. Without a mask, return x."""
        return x if self.mask is None else x * self.mask


def apply_layer(layer: nn.Module, x: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return layer(x), with `tensors` as the layer's own tensors and with `mask` in place of its dropout.

    Gradients reach `tensors`. This would not work with the layer's own tensors: they are leaves, which pass no
    gradients on.
    """
    layer.dropout = Masked(mask)
    y: Tensor = torch.func.functional_call(layer, dict(tensors), (x,))
    return y


def dense_linear(W: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen linear layer with the weight W (E, D) and the bias (E,)."""
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
    """Return random inputs of a linear layer with dropout: `x` (*rows, D), `bias` (E,) and `mask` (shape of x).

    shape: (E, D). bias: if False, the returned bias is None. dropout: the probability that an element of x is dropped.
    If it is 0, the returned mask is None.
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
    """Return random matrices A (R, D) and B (E, R). Neither of them is zero.

    Their scale is such that B A x is about as large as a random x.
    """
    E, D = shape
    return {
        "A": draw(generator, dtype, rank, D, spread=D**-0.5),
        "B": draw(generator, dtype, E, rank, spread=rank**-0.5),
    }
