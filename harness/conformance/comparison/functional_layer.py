"""Run a layer of the reference as a function of its tensors.

This module serves Operations that compute the forward pass of a layer. It also draws their random arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from harness.conformance.operation import Arguments, draw, mapped
from reference import dora, lora

_TIMES = (1.0, 0.5, 3.0)
"""Scalings of several layers, as multiples of the first layer's scaling."""
_LARGE = 2.0**11
"""Factor of a large gate's weight. Many outputs of the gate then exceed 1,211. Their square times 0.0447, as in GELU's
approximation by tanh, overflows float16."""
_LARGE_ROWS = 2.0**9
"""Factor of the same weight with DoRA. The square of a row's norm then overflows float16. A larger factor would let
x W^T + (g - 1) x W^T lose all digits there."""


class Masked(nn.Module):
    """Layer that multiplies by a given mask, in place of dropout.

    The mask has the shape of the input x. Its elements are 0 or 1 / (1 - p), where p is the dropout probability.
    """

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the mask. Without a mask, return x."""
        return x if self.mask is None else x * self.mask


def apply_layer(layer: nn.Module, x: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return layer(x), with `tensors` as the layer's own tensors and with `mask` in place of its dropout.

    Gradients flow back through `tensors`.
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


def with_rows_turned_towards(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return B with some rows negated: no row of scaling B A then has a negative inner product with the same row of W.

    Without this, a row of W + scaling B A may be nearly zero in a layer of few features, and DoRA divides by its norm.
    """
    return torch.where(((B @ A) * W).sum(dim=1, keepdim=True) * scaling < 0, -B, B)


def smaller(dtype: torch.dtype) -> float:
    """Return a factor that makes the rows of a weight very small: their norms are about 1e-9, or 0.004 in float16.

    In float16, the squares of such numbers are subnormal. A norm from them is wrong, for long rows by a fifth.
    """
    return 2.0**-8 if dtype == torch.float16 else 2.0**-30


def draw_adapted_layers(
    dtype: torch.dtype,
    generator: torch.Generator,
    shapes: Sequence[Sequence[int]],
    *,
    ranks: Sequence[int],
    scaling: float,
    bias: bool,
    dora: bool,
    shared: bool,
) -> Arguments:
    """Return random tensors of several adapted layers, as lists with one item per layer.

    shapes: (E, D) of each layer's W. ranks: R of each layer. The keys are `Ws` (E, D), `biases` (E,), `As` (R, D), `Bs`
    (E, R), `scalings` and the magnitudes `ms` (E,). Without `bias`, `biases` is None; without `dora`, `ms` is None. The
    layers have 1, 0.5 and 3 times `scaling`, so that a confusion of layers shows. shared: all layers with as many inputs
    and the same rank as the first one have the same tensor A.
    """
    Ws = [draw(generator, torch.float64, E, D, spread=D**-0.5) for E, D in shapes]
    low = [draw_low_rank(torch.float64, generator, shape, rank) for shape, rank in zip(shapes, ranks, strict=True)]
    if shared:
        A = low[0]["A"]
        low = [one | {"A": A} if one["A"].shape == A.shape else one for one in low]
    Bs = [one["B"] for one in low]
    if dora:
        Bs = [with_rows_turned_towards(W, one["A"], one["B"], scaling) for W, one in zip(Ws, low, strict=True)]
    return {
        "Ws": [W.to(dtype) for W in Ws],
        "biases": [draw(generator, dtype, E) for E, _ in shapes] if bias else None,
        "As": mapped([one["A"] for one in low], lambda A: cast("Tensor", A).to(dtype)),
        "Bs": [B.to(dtype) for B in Bs],
        "scalings": [scaling * times for times in _TIMES[: len(shapes)]],
        "ms": [draw(generator, dtype, E) for E, _ in shapes] if dora else None,
    }


def change_first(layers: Arguments, magnitude: str) -> None:
    """Make the weight of the first layer in `layers` larger or smaller, by the name of a level of WeightMagnitude."""
    W, B = layers["Ws"][0], layers["Bs"][0]
    if magnitude == "large":
        layers["Ws"][0] = (_LARGE if layers["ms"] is None else _LARGE_ROWS) * W
    if magnitude == "small":
        layers["Ws"][0], layers["Bs"][0] = smaller(W.dtype) * W, smaller(W.dtype) * B
        if layers["ms"] is not None and W.dtype == torch.float16:  # a large gain would make gradients overflow
            layers["ms"][0] = smaller(W.dtype) * layers["ms"][0]


def adapted_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, m: Tensor | None
) -> Tensor:
    """Return the output (..., E) of the reference's LoRA layer, or of its DoRA layer if there are magnitudes m (E,)."""
    base = dense_linear(W, bias)
    if m is None:
        return apply_layer(lora.LoraLinear(base, A, B, scaling, dropout=0.0), x, None, {"A": A, "B": B})
    config = dora.Config(rank=len(A), alpha=scaling * len(A))
    return apply_layer(dora.DoraLinear(base, A, B, config), x, None, {"A": A, "B": B, "m": m})
