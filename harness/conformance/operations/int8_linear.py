"""int8_linear: a linear layer with a frozen weight in the 8 bits of LLM.int8(); the gradient reaches only the input."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Factor, Matrix, Rows
from harness.conformance.operation import Arguments, Operation, draw
from reference.operations import int8
from reference.shared.int8_weight import add_bias

Threshold = Annotated[float, Factor((0.0, 2.5, 6.0, 0.25), (0.01, 100.0), least=0.0, most=8.0)]
"""Magnitude of outliers. Of normal numbers, 1 in 80 exceeds 2.5, and 1 in 500 million exceeds 6."""


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rows: Rows,
    threshold: Threshold = 0.0,
    bias: bool = True,
    training: bool = False,
) -> Arguments:
    """Draw the arguments of one call. shape: (E, D) of the weight. rows: the leading dimensions of x.

    One number of x is the threshold itself. If float16 or the dtype of x rounds the threshold, no magnitude in x rounds
    to the same number as the threshold: a program may compare with the threshold before or after rounding it.
    """
    E, D = shape
    codes, absmax = int8.quantize(draw(generator, dtype, E, D, spread=D**-0.5))
    x = draw(generator, dtype, *rows, D)
    rounded = torch.tensor(threshold, dtype=dtype).to(torch.float16)
    if threshold and float(rounded) == threshold:
        x.view(-1)[:1] = threshold
    elif threshold:
        x = torch.where(x.to(torch.float16).abs() == rounded, x / 2, x)
    return {
        "x": x,
        "codes": codes,
        "absmax": absmax,
        "bias": draw(generator, dtype, E) if bias else None,
        "threshold": threshold,
        "training": training,
    }


def reference(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, training: bool
) -> Tensor:
    """Return x W^T + bias, shape (..., E), in the dtype of x. W has the codes (E, D) and the absmax (E,).

    In eval mode, x is quantised too, except in columns with a number of at least `threshold`; 0: in all columns. The
    gradient of x is that of the product with the decoded weight, in both modes.
    """
    return add_bias(int8.multiply(x, codes, absmax, threshold, training), bias)


OPERATION = Operation("int8_linear", ("y",), arguments, reference, differentiable=("x",))
