"""lora_mlp: a gated feed-forward block (SwiGLU or GEGLU, arXiv:2002.05202) with LoRA or DoRA on its three layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from harness.conformance.comparison.functional_layer import adapted_linear, change_first, draw_adapted_layers
from harness.conformance.drawing.factors import Matrix, Rows, Scaling, ThreeRanks, WeightMagnitude
from harness.conformance.operation import Arguments, Operation, draw

Activation = Literal["silu", "gelu", "gelu-tanh"]
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu-tanh": partial(gelu, approximate="tanh"),
}


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rows: Rows,
    ranks: ThreeRanks,
    activation: Activation = "silu",
    scaling: Scaling = 1.75,
    bias: bool = False,
    dora: bool = False,
    shared: bool = False,
    gate: WeightMagnitude = "normal",
) -> Arguments:
    """Draw the arguments of a call.

    shape: (F, D), the shape of W in gate and up; in down, W is (D, F). rows: the leading dimensions of x. ranks: the
    ranks of gate, up and down. scaling: the scaling of gate; up has 0.5 times, down 3 times this scaling. dora: True also
    draws magnitudes; without them, every layer has plain LoRA. shared: gate and up have one tensor as their A if their
    ranks are equal. gate: `large` multiplies the gate's weight by 2,048, or by 512 with DoRA. `small` multiplies its
    weight and its B by 2^-30; in float16, it multiplies them, and with DoRA also the magnitudes, by 2^-8.
    """
    F, D = shape
    layers = draw_adapted_layers(
        dtype, generator, [(F, D), (F, D), (D, F)], ranks=ranks, scaling=scaling, bias=bias, dora=dora, shared=shared
    )
    change_first(layers, gate)
    return {"x": draw(generator, dtype, *rows, D), **layers, "activation": activation}


def reference(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ms: Sequence[Tensor] | None,
    activation: str,
) -> Tensor:
    """Return down(activation(gate(x)) * up(x)), shape (..., D).

    The lists have the tensors of gate, up and down, in this order. Each layer is x W^T + bias + scaling (x A^T) B^T, or
    with magnitudes ms DoRA's layer: bias + g (x W^T + scaling (x A^T) B^T), g = m / ||W + scaling B A||. The norm
    counts as a constant in the backward pass. g is 0 where the norm is 0. `gelu` is the exact GELU, and `gelu-tanh` its
    approximation by tanh.
    """

    def layer(x: Tensor, at: int) -> Tensor:
        bias, m = None if biases is None else biases[at], None if ms is None else ms[at]
        return adapted_linear(x, Ws[at], bias, As[at], Bs[at], scalings[at], m)

    gate, up = layer(x, 0), layer(x, 1)
    return layer(_FUNCTIONS[activation](gate) * up, 2)


def _without_gain(ms: object, **others: Any) -> Tensor:
    return reference(**others, ms=None)


OPERATION = Operation(
    "lora_mlp", ("y",), arguments, reference, differentiable=("x", "As", "Bs", "ms"), inputs=("x",),
    unscaled=_without_gain,
)  # fmt: skip
