"""paged_states: which parameters have paged optimizer states: those with at least 100,000 elements, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Factor
from harness.conformance.operation import Arguments, Operation, draw
from harness.conformance.operations import paged_adamw
from reference.operations import paged

Sizes = Annotated[Sequence[int], Factor(((1000, 99_999, 100_000, 200_000), (200_000, 1, 100_000, 99_900)))]


def arguments(dtype: torch.dtype, generator: torch.Generator, *, sizes: Sizes, vectors: bool = True) -> Arguments:
    """Draw parameters of these sizes and one gradient each.

    vectors: False for matrices with 100 columns if the size is a multiple of 100, and for a scalar if it is 1.
    """

    def shape(size: int) -> tuple[int, ...]:
        if vectors or size % 100:
            return () if size == 1 and not vectors else (size,)
        return size // 100, 100

    drawn = [[draw(generator, dtype, *shape(size)) for size in sizes] for _ in range(2)]
    return {"params": drawn[0], "grads": drawn[1]}


def reference(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Return a float32 tensor with one number per parameter: 1 if its states are paged, else 0.

    The tensor has this dtype whatever dtype the parameters have.
    """
    trained = [p.detach().clone().requires_grad_(True) for p in params]
    optimizer = paged.Paged(torch.optim.AdamW(trained), budget=0)
    paged_adamw.steps(optimizer, trained, [grads])
    return torch.tensor([float(p in optimizer.where()) for p in trained], dtype=torch.float32, device=trained[0].device)


OPERATION = Operation("paged_states", ("paged",), arguments, reference)
