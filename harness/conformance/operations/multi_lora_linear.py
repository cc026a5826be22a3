"""multi_lora_linear: one linear layer for a batch of sequences with LoRA adapters of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.conformance.operation import Arguments, Operation, draw
from reference.operations import multi_lora


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    ids: Sequence[int],
    ranks: Sequence[int],
    shape: Sequence[int],
    tokens: int = 3,
) -> Arguments:
    """Draw the arguments of one call. ids: the adapter of each sequence, or -1; shape: (D, E); ranks: one an adapter."""
    D, E = shape
    return {
        "x": draw(generator, dtype, len(ids), tokens, D),
        "W": draw(generator, dtype, E, D, spread=D**-0.5),
        "As": [draw(generator, dtype, rank, D, spread=D**-0.5) for rank in ranks],
        "Bs": [draw(generator, dtype, E, rank, spread=rank**-0.5) for rank in ranks],
        "scalings": [0.5 + index for index in range(len(ranks))],
        "ids": torch.tensor(ids),
    }


def reference(
    x: Tensor, W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], ids: Tensor
) -> Tensor:
    """Return x W^T + scalings[i] x As[i]^T Bs[i]^T with i = ids[n], for each sequence n; (N, T, E)."""
    return multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)


OPERATION = Operation(
    name="multi_lora_linear",
    outputs=("y",),
    arguments=arguments,
    reference=reference,
    differentiable=("x", "W", "As", "Bs"),
)
