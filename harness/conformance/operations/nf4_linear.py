"""nf4_linear: a linear layer with a frozen, packed NF4 weight; the gradient reaches only the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.conformance.comparison.quantised_codes import Decoded, FourBit
from harness.conformance.drawing.factors import Block, Matrix, Rows
from harness.conformance.operation import Arguments, Operation, draw
from reference.operations import nf4

_FORM = FourBit(nf4)


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rows: Rows,
    block: Block = 64,
    bias: bool = True,
    training: bool = True,
    decoded: Decoded = False,
) -> Arguments:
    """Draw the arguments of one call. shape: (E, D) of the weight. rows: the leading dimensions of x.

    decoded: whether some absmax are negative, as double quantisation may decode a small absmax.
    """
    packed = _FORM.packed_arguments(dtype, generator, shape=shape, block=block, decoded=decoded)
    E, D = shape
    return {
        "x": draw(generator, dtype, *rows, D, spread=D**-0.5),
        **{name: packed[name] for name in ("packed", "absmax", "block", "shape")},
        "bias": draw(generator, dtype, E) if bias else None,
        "training": training,
    }


def reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    block: int,
    shape: Sequence[int],
    bias: Tensor | None,
    training: bool,
) -> Tensor:
    """Return x W^T + bias, shape (..., E), where W is decoded and cast to the dtype of x.

    training: mode of an implementation that is a layer; ignored here.
    """
    return linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)


OPERATION = Operation("nf4_linear", ("y",), arguments, reference, differentiable=("x",), inputs=("x",))
