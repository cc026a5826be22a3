"""vera_linear: VeRA's linear layer, with dropout by a given mask."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.conformance.comparison.functional_layer import apply_layer, dense_linear, draw_inputs, draw_low_rank
from harness.conformance.drawing.factors import Dropout, Matrix, Rank, Rows
from harness.conformance.operation import Arguments, Operation, draw
from reference import vera


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rows: Rows,
    rank: Rank,
    bias: bool = True,
    dropout: Dropout = 0.0,
) -> Arguments:
    """Draw the arguments of one call. shape: (E, D) of W. rows: leading dimensions of x. dropout: 0 gives no mask.

    A and B are noise and fit this layer. In a model, `attach` cuts them from a larger pair that all layers share.
    """
    return {
        "W": draw(generator, dtype, *shape, spread=shape[1] ** -0.5),
        **draw_low_rank(dtype, generator, shape, rank),
        "b": draw(generator, dtype, shape[0]),
        "d": draw(generator, dtype, rank),
        **draw_inputs(dtype, generator, shape, rows, bias=bias, dropout=dropout),
    }


def reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, b: Tensor, d: Tensor, mask: Tensor | None
) -> Tensor:
    """Return x W^T + bias + b ((d ((x mask) A^T)) B^T), shape (..., E)."""
    return apply_layer(vera.VeraLinear(dense_linear(W, bias), A, B, b, d, dropout=0.0), x, mask, {"b": b, "d": d})


OPERATION = Operation("vera_linear", ("y",), arguments, reference, differentiable=("x", "b", "d"), inputs=("x",))
