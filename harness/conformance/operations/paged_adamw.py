"""paged_adamw: a few steps of AdamW whose states are paged to the host's memory. Paging must not change any value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Factor, WeightDecay
from harness.conformance.operation import Arguments, Operation, draw
from reference.operations import paged

Sizes = Annotated[Sequence[int], Factor(((1000, 100_000), (99_999, 100_001), (100_000, 100_000)))]
Steps = Annotated[int, Factor((3, 1, 5), least=1, most=6)]


def arguments(
    dtype: torch.dtype, generator: torch.Generator, *, sizes: Sizes, steps: Steps = 3, weight_decay: WeightDecay = 0.0
) -> Arguments:
    """Draw two parameters of these sizes, and their gradients for every step. Gradients of different steps differ in
    size.

    torch stores moments in the parameter's dtype, and float16 cannot represent small second moments. The large eps
    makes them irrelevant.
    """
    return {
        "params": [draw(generator, dtype, size) for size in sizes],
        "grads": [[draw(generator, dtype, size, spread=10.0 ** (i % 3 - 1)) for size in sizes] for i in range(steps)],
        "lr": 0.1, "betas": (0.9, 0.999), "eps": 0.1, "weight_decay": weight_decay,
    }  # fmt: skip


def steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> None:
    """Take one optimizer step with each list in `grads`. A list has one gradient per parameter."""
    for several in grads:
        for p, g in zip(params, several, strict=True):
            p.grad = g
        optimizer.step()


def reference(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], **how: Any) -> tuple[Tensor, ...]:
    """Return the parameters after the last step. how: options of AdamW.

    The parameters are compared within rounding errors, so that an implementation may store its moments in float32.
    """
    trained = [p.detach().clone().requires_grad_(True) for p in params]
    steps(paged.Paged(torch.optim.AdamW(trained, **how), budget=0), trained, grads)
    return tuple(p.detach() for p in trained)


OPERATION = Operation("paged_adamw", ("p0", "p1"), arguments, reference)
