"""lora_qkv: the query, key and value layers of an attention block on one input, each with LoRA or DoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from harness.conformance.comparison.functional_layer import adapted_linear, change_first, draw_adapted_layers
from harness.conformance.drawing.factors import Matrix, Rows, Scaling, ThreeRanks, WeightMagnitude
from harness.conformance.operation import Arguments, Operation, draw


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rows: Rows,
    ranks: ThreeRanks,
    groups: Literal[1, 2, 4] = 1,
    scaling: Scaling = 1.75,
    bias: bool = True,
    key_bias: bool = True,
    dora: bool = False,
    shared: bool = False,
    query: WeightMagnitude = "normal",
) -> Arguments:
    """Draw the arguments of a call.

    shape: (E, D) of the query's W. rows: the leading dimensions of x. groups: the number of query heads that share a
    key and a value, so that k and v have E / groups outputs, at least one. scaling: the scaling of q; k has 0.5 times,
    v 3 times this scaling. bias: whether the layers have biases. key_bias: False leaves out the bias of k, as in
    Whisper. dora: True also draws magnitudes; without them, every layer has plain LoRA. shared: layers of
    the query's rank have one tensor as their A. query: `large` multiplies the query's weight by 2,048, or by 512 with
    DoRA. `small` multiplies its weight and its B by 2^-30; in float16, it multiplies them, and with DoRA also the
    magnitudes, by 2^-8.
    """
    E, D = shape
    key = value = (max(1, E // groups), D)
    layers = draw_adapted_layers(
        dtype, generator, [(E, D), key, value], ranks=ranks, scaling=scaling, bias=bias, dora=dora, shared=shared
    )
    change_first(layers, query)
    if bias and not key_bias:
        layers["biases"] = [None if layer == 1 else b for layer, b in enumerate(layers["biases"])]
    return {"x": draw(generator, dtype, *rows, D), **layers}


def reference(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ms: Sequence[Tensor] | None,
) -> tuple[Tensor, ...]:
    """Return q, k and v. Each is x W^T + bias + scaling (x A^T) B^T, shape (..., E).

    With magnitudes ms, each is bias + g (x W^T + scaling (x A^T) B^T) instead. g = m / ||W + scaling B A|| is DoRA's
    gain per output. The norm in g counts as a constant in the backward pass. g is 0 where the norm is 0.
    """

    def layer(at: int) -> Tensor:
        bias, m = None if biases is None else biases[at], None if ms is None else ms[at]
        return adapted_linear(x, Ws[at], bias, As[at], Bs[at], scalings[at], m)

    return layer(0), layer(1), layer(2)


def _without_gain(ms: object, **others: Any) -> tuple[Tensor, ...]:
    return reference(**others, ms=None)


OPERATION = Operation(
    "lora_qkv", ("q", "k", "v"), arguments, reference, differentiable=("x", "As", "Bs", "ms"), inputs=("x",),
    unscaled=_without_gain,
)  # fmt: skip
