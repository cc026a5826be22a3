"""nf4_lora_linear: LoRA on a linear layer with a packed NF4 weight, as in QLoRA; dropout by a given mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.conformance.comparison.functional_layer import apply_layer, dense_linear, draw_inputs, draw_low_rank
from harness.conformance.comparison.quantised_codes import Decoded, FourBit
from harness.conformance.drawing.factors import Block, Dropout, Matrix, Rank, Rows, Scaling
from harness.conformance.operation import Arguments, Operation
from reference import lora
from reference.operations import nf4

_FORM = FourBit(nf4)


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rows: Rows,
    rank: Rank,
    block: Block = 64,
    scaling: Scaling = 1.75,
    bias: bool = True,
    dropout: Dropout = 0.0,
    decoded: Decoded = False,
) -> Arguments:
    """Draw the arguments of one call. shape: (E, D) of W. rows: leading dimensions of x. dropout: 0 gives no mask.

    decoded: whether some absmax are negative, as double quantisation may decode a small absmax.
    """
    packed = _FORM.packed_arguments(dtype, generator, shape=shape, block=block, decoded=decoded)
    return {
        **{name: packed[name] for name in ("packed", "block", "shape")},
        "absmax": packed["absmax"] * shape[1] ** -0.5,  # so that x W^T is no larger than the update
        **draw_low_rank(dtype, generator, shape, rank),
        **draw_inputs(dtype, generator, shape, rows, bias=bias, dropout=dropout),
        "scaling": scaling,
    }


def reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    block: int,
    shape: Sequence[int],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, shape (..., E), where W is decoded and cast to the dtype of x.

    This is QLoRA's forward pass (arXiv:2305.14314, eq. 5): LoRA on the decoded weight.
    """
    # The layer in reference/qlora.py takes a dense weight and encodes it itself.
    base = dense_linear(_FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)
    return apply_layer(lora.LoraLinear(base, A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})


OPERATION = Operation("nf4_lora_linear", ("y",), arguments, reference, differentiable=("x", "A", "B"), inputs=("x",))
