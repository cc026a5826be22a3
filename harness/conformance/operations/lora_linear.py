"""lora_linear: a frozen linear layer with LoRA's update, and dropout by a given mask."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.conformance.comparison.functional_layer import apply_layer, dense_linear, draw_inputs, draw_low_rank
from harness.conformance.drawing.factors import Dropout, Matrix, Rank, Rows, Scaling
from harness.conformance.operation import Arguments, Operation, draw
from reference import lora


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
) -> Arguments:
    """Draw the arguments of a call. shape: (E, D) of W. rows: the leading dimensions of x. dropout: 0 gives no mask."""
    return {
        "W": draw(generator, dtype, *shape, spread=shape[1] ** -0.5),
        **draw_low_rank(dtype, generator, shape, rank),
        **draw_inputs(dtype, generator, shape, rows, bias=bias, dropout=dropout),
        "scaling": scaling,
    }


def reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, shape (..., E)."""
    return apply_layer(lora.LoraLinear(dense_linear(W, bias), A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})


OPERATION = Operation("lora_linear", ("y",), arguments, reference, differentiable=("x", "A", "B"), inputs=("x",))
