"""paged_states: which parameters have their optimizer states paged. The parameters may be on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Factor
from harness.conformance.operation import Arguments, Operation, draw
from harness.conformance.operations import paged_adamw
from reference.operations import paged

Sizes = Annotated[Sequence[int], Factor(((1000, 99_999, 100_000, 200_000),))]


def arguments(dtype: torch.dtype, generator: torch.Generator, *, sizes: Sizes) -> Arguments:
    """Draw parameters of these sizes and one gradient each."""
    return {"params": [draw(generator, dtype, n) for n in sizes], "grads": [draw(generator, dtype, n) for n in sizes]}


def reference(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Return a float tensor with one number per parameter: 1 if its states are paged, else 0."""
    trained = [p.clone().requires_grad_(True) for p in params]
    optimizer = paged.Paged(torch.optim.AdamW(trained), budget=0)
    paged_adamw.steps(optimizer, trained, [grads])
    return torch.tensor([float(p in optimizer.where()) for p in trained], device=trained[0].device)


OPERATION = Operation("paged_states", ("paged",), arguments, reference)
