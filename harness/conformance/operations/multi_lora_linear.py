"""multi_lora_linear: one linear layer for a batch of sequences, each of which has its own LoRA adapter or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.conformance.drawing.factors import BEYOND_8_BITS, LARGEST_SIZE, LENGTHS, Factor, Matrix, Tokens
from harness.conformance.operation import Arguments, Operation, draw
from reference.operations import multi_lora

Ids = Annotated[
    Sequence[int],
    Factor(
        ((1, 0, -1, 1), (0,), (-1, -1), (0, -1, 0), (4, 3, -1, 0, 2, 1, 0, 5, 11), (2, 2, 0, 1, 0, 2)),
        ((), (0,) * 9, tuple(n * 7 % 34 - 1 for n in range(70))),
        least=-1,
        most=11,
        dimensions=LENGTHS,
    ),
]
Ranks = Annotated[
    Sequence[int],
    Factor(
        ((3, 16), (4,), (1, 1, 8), (64, 4, 17, 2, 130), (2,) * 12),
        ((260, 1030), (3, 1) * 17, (8, 8), (16, 1, 16)),
        least=1,
        most=LARGEST_SIZE,
        dimensions=LENGTHS,
    ),
]
Distinct = Annotated[int, Factor((0, 9), (1, 2, 33, BEYOND_8_BITS))]


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    ids: Ids,
    ranks: Ranks,
    shape: Matrix,
    tokens: Tokens = 3,
    distinct: Distinct = 0,
    index: Literal["int64", "int32"] = "int64",
    padding: Literal["none", "left", "right", "left-token", "right-token"] = "none",
) -> Arguments:
    """Draw the arguments of one call.

    ids: the adapter of each sequence, or -1 for none. An id beyond the last adapter is taken modulo the number of
    adapters. ranks: the rank of each adapter. shape: (D, E), the input and output features. distinct: if above 0, the
    number of adapters. Their ranks then repeat the list `ranks`, and the batch gets one more sequence for each of them.
    index: the dtype of the ids. tokens: the length of a sequence with its padding; x has the shape (sequences, tokens, D).
    padding: `none`, or the side on which shorter sequences are padded. `left` and `right` pad with zeros; `left-token` and
    `right-token` with one random row, like a padding token's embedding. Rows of padding are compared, too.
    """
    D, E = shape
    if distinct:
        ids, ranks = [*ids, *range(distinct)], [ranks[n % len(ranks)] for n in range(distinct)]
    x = draw(generator, dtype, len(ids), tokens, D)
    if padding != "none":
        place, lengths = torch.arange(tokens), 1 + torch.arange(len(ids)) % tokens  # the first sequence is the shortest
        is_padding = (place.flip(0) if padding.startswith("left") else place) >= lengths[:, None]
        x[is_padding] = draw(generator, dtype, D) if padding.endswith("token") else 0
    return {
        "x": x,
        "W": draw(generator, dtype, E, D, spread=D**-0.5),
        "As": [draw(generator, dtype, rank, D, spread=D**-0.5) for rank in ranks],
        "Bs": [draw(generator, dtype, E, rank, spread=rank**-0.5) for rank in ranks],
        "scalings": [0.5 + index for index in range(len(ranks))],
        "ids": torch.tensor([n if n < len(ranks) else n % len(ranks) for n in ids], dtype=getattr(torch, index)),
    }


def reference(
    x: Tensor, W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], ids: Tensor
) -> Tensor:
    """Return x W^T + scalings[i] x As[i]^T Bs[i]^T, shape (N, T, E). Here i = ids[n] is the adapter of sequence n.

    If ids[n] is -1, the sequence gets only x W^T. The A and B of an adapter that no sequence uses get the gradient None.
    """
    return multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)


OPERATION = Operation(
    name="multi_lora_linear",
    outputs=("y",),
    arguments=arguments,
    reference=reference,
    differentiable=("x", "W", "As", "Bs"),
    inputs=("x",),
)
