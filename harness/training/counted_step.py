"""One more step after the training, whose memory is counted tensor by tensor; it leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from harness.measure.allocations import most_while
from harness.measure.memory import tensor_bytes
from harness.methods import Adapted
from harness.training import loop
from harness.training.batches import Batch


def most_in_step(
    adapted: Adapted,
    head: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    accumulate: int = 1,
) -> int | None:
    """Return the most bytes of CPU tensors that exist at one time in a training step; None where torch cannot count them.

    The step is one over the batch of which the model takes the most tokens at once, with the optimizer's state there. It is
    no timed one: counting slows it down. What trains is put back afterwards, and so are the random numbers; the optimizer
    is not, and gradients are gone. The Method's `after_step` has no part in it, for it could not be undone.
    """
    parts = max((batch.parts(accumulate) for batch in batches), key=lambda p: max(part.padded_tokens for part in p))
    trainable = loop.trainable(adapted, head)
    optimizer.zero_grad(set_to_none=True)
    copies, random = [p.detach().clone() for p in trainable], torch.get_rng_state()
    try:
        most = most_while(lambda: loop.step(adapted, parts, optimizer, seed=0))
    finally:
        torch.set_rng_state(random)
        with torch.no_grad():
            for p, copy in zip(trainable, copies, strict=True):
                p.copy_(copy)
    optimizer.zero_grad(set_to_none=True)
    return None if most is None else most - tensor_bytes([*copies, random])
