"""dora_linear: DoRA's linear layer with one magnitude per output, and dropout by a given mask."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from harness.conformance.comparison.functional_layer import (
    apply_layer,
    dense_linear,
    draw_inputs,
    draw_low_rank,
    smaller,
    with_rows_turned_towards,
)
from harness.conformance.drawing.factors import Dropout, Matrix, Rank, Rows, Scaling
from harness.conformance.operation import Arguments, Operation, draw
from harness.conformance.operations import lora_linear
from reference import dora

Kind = Literal["normal", "zero-rows", "cancelled", "large-rows", "small-rows", "start"]
_LEFT = 1 / 16
"""In the kind `cancelled`, W cancels the update except for this share, so that V = W + scaling B A is small.

With a smaller share, V would consist of rounding errors in 16 bits. With a larger share, a norm computed inaccurately
from products of W, A and B would pass.
"""
_LARGE = 2.0**8
"""Factor of W and B in large rows. The norm of such a row of V exceeds 256, so its square exceeds the largest float16."""
_LARGEST_SCALING = 2.0
"""If the absolute scaling is larger than this, B shrinks in large rows, so that the update grows no further."""
_LARGE_M = 2.0**4
"""Factor of the magnitudes of large rows. A larger factor would make gradients of many rows of x overflow in float16."""


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rows: Rows,
    rank: Rank,
    scaling: Scaling = 1.75,
    bias: bool = True,
    dropout: Dropout = 0.0,
    kind: Kind = "normal",
) -> Arguments:
    """Draw the arguments of one call. shape: (E, D) of W. rows: leading dimensions of x. dropout: 0 gives no mask.

    kind: decides every fourth row of V = W + scaling B A. `normal`: like the other rows. `zero-rows`: W and B are zero
    there, as in published weights. `cancelled`: W cancels all but a sixteenth of the update. `large-rows`: W and the
    update are 256 times as large; an absolute scaling above 2 does not enlarge it. `small-rows`: W and B are multiplied by
    2^-30; in float16, W, B and m are multiplied by 2^-8. The magnitudes m are noise of either sign. `start`: B is zero
    and m has the norms of the rows of W, as when training starts.
    """
    W = draw(generator, torch.float64, *shape, spread=shape[1] ** -0.5)
    A, B = draw_low_rank(torch.float64, generator, shape, rank).values()
    B = with_rows_turned_towards(W, A, B, scaling)
    fourth = slice(1, None, 4)
    if kind == "zero-rows":
        W[fourth], B[fourth] = 0.0, 0.0
    elif kind == "cancelled":
        W[fourth] = (_LEFT - 1) * scaling * (B @ A)[fourth]
    m = draw(generator, dtype, shape[0])
    if kind == "start":
        B, m = torch.zeros_like(B), torch.linalg.vector_norm(W.to(dtype).double(), dim=1).to(dtype)
    if kind == "large-rows":
        # A program may compute g (V x), so V x must stay below the largest float16, even if the scaling is large.
        W[fourth], m[fourth] = _LARGE * W[fourth], _LARGE_M * m[fourth]
        B[fourth] *= _LARGE / max(1.0, abs(scaling) / _LARGEST_SCALING)
    if kind == "small-rows":
        W[fourth], B[fourth] = smaller(dtype) * W[fourth], smaller(dtype) * B[fourth]
        if dtype == torch.float16:  # a gain of 256 would make gradients of a large x overflow
            m[fourth] = smaller(dtype) * m[fourth]
    return {
        "W": W.to(dtype),
        "A": A.to(dtype),
        "B": B.to(dtype),
        "m": m,
        **draw_inputs(dtype, generator, shape, rows, bias=bias, dropout=dropout),
        "scaling": scaling,
    }


def reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Return x W^T + bias + (g - 1) ((x mask) W^T) + g scaling ((x mask) A^T) B^T, shape (..., E).

    The gain g of a row is m / ||V|| with V = W + scaling B A. ||V|| is the norm of that row of V, and counts as a
    constant in the backward pass. g is 0 where the norm is 0. A row of W or B with a NaN or an infinity has the output
    NaN; an implementation may return an infinity.
    """
    layer = dora.DoraLinear(dense_linear(W, bias), A, B, dora.Config(rank=len(A), alpha=scaling * len(A)))
    return apply_layer(layer, x, mask, {"A": A, "B": B, "m": m})


def _without_gain(m: Tensor, **others: Any) -> Tensor:
    return lora_linear.reference(**others)


OPERATION = Operation(
    "dora_linear",
    ("y",),
    arguments,
    reference,
    differentiable=("x", "A", "B", "m"),
    inputs=("x",),
    unscaled=_without_gain,
)
