"""One more step after the training, whose memory is counted tensor by tensor; what it changes is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from harness.cell.measure.allocations import has_storage, most_while
from harness.cell.measure.memory import tensor_bytes
from harness.cell.training import loop
from harness.cell.training.batches import Batch
from harness.methods.spec import Adapted


def most_in_step(
    adapted: Adapted,
    head: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    accumulate: int = 1,
) -> int | None:
    """Return the most bytes of CPU tensors that exist at one time in a training step; None where torch cannot count them.

    The step is one over the batch of which the model takes the most tokens at once, with the optimizer's state there. It is
    no timed one: counting slows it down. It is the one after the last, T + 1: what an optimizer does every so many steps
    (GaLore's SVD, every `update_gap`) is in it only where T + 1 is such a step. The Method's `after_step` has no part in it.

    Put back afterwards, also where the step fails: what trains; the model's buffers (a BatchNorm's statistics), but for
    what the Method made and does not train, which may be as large as the weights; the random states of torch, Python and
    numpy, and of a generator that a module has as an attribute. Not put back: the optimizer; gradients, which are gone; and
    what else code keeps for itself, e.g. a counter or a cache that is no buffer, or a generator in a closure.
    """
    parts = most_tokens(batches, accumulate)
    optimizer.zero_grad(set_to_none=True)
    with _put_back(adapted, loop.trainable(adapted, head)) as copies:
        try:
            most = most_while(lambda: loop.step(adapted, parts, optimizer, seed=0))
        finally:
            optimizer.zero_grad(set_to_none=True)
        return None if most is None else most - tensor_bytes(copies)


def most_tokens(batches: Sequence[Batch], accumulate: int) -> list[Batch]:
    """Return the parts of that batch of which the model takes the most tokens at once."""
    return max((batch.parts(accumulate) for batch in batches), key=lambda p: max(part.padded_tokens for part in p))


def copied_B(adapted: Adapted, head: Sequence[nn.Parameter]) -> int:  # noqa: N802  # a unit
    """Return how many bytes of the model `most_in_step` copies, to put them back."""
    return tensor_bytes([*loop.trainable(adapted, head), *_buffers(adapted)])


@contextmanager
def _put_back(adapted: Adapted, trainable: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Put back at the end what the step changes; yield the tensors that were made for that."""
    kept = [*trainable, *_buffers(adapted)]
    # A module may put a new tensor in the place of its buffer.
    places = [
        (module, name, buffer)
        for module in adapted.model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    values = [vars(module).values() for module in adapted.model.modules()]
    generators = {id(v): v for of_module in values for v in of_module if isinstance(v, torch.Generator)}.values()
    copies, states = [t.detach().clone() for t in kept], [g.get_state() for g in generators]
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield [*copies, *states, of_torch]
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for module, name, buffer in places:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
        with torch.no_grad():
            for t, copy in zip(kept, copies, strict=True):
                if not torch.equal(t, copy):  # an expanded tensor cannot be written to, nor was it
                    t.copy_(copy)


def _buffers(adapted: Adapted) -> list[Tensor]:
    """List the model's buffers that a step may change: no packed constants, no PiSSA's residual."""
    frozen = {t.untyped_storage().data_ptr() for t in adapted.state().values()}
    return [b for b in adapted.model.buffers() if has_storage(b) and b.untyped_storage().data_ptr() not in frozen]
