"""Count the memory of one more training step, tensor by tensor, and undo its changes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from harness.cell.measure.memory import has_storage, peak_while, tensor_bytes
from harness.cell.training import loop
from harness.cell.training.batches import Batch
from harness.methods.spec import Adapted


def step_peak(
    adapted: Adapted,
    head: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    accumulate: int = 1,
) -> int | None:
    """Return the peak bytes of CPU tensors in a training step; None if torch cannot count them.

    The step uses the batch with the most tokens in the model at once, and the optimizer already has its states. The step is
    not timed, because counting slows it down. It comes after the last step T of the training: it includes periodic work of
    an optimizer (GaLore's SVD) only if this work is due in step T + 1. The Method's `after_step` is not called.

    The function restores, also if the step fails: trained parameters; the model's buffers (a BatchNorm's statistics), except
    untrained buffers of the Method, which may be as large as the weights; and the random states of torch, Python, numpy and
    the generators that are attributes of modules. It does not restore the optimizer, the gradients (they are dropped) or
    other state, e.g. a counter, a cache that is no buffer, or a generator in a closure.
    """
    parts = most_tokens(batches, accumulate)
    optimizer.zero_grad(set_to_none=True)
    with _restored(adapted, loop.trainable(adapted, head)) as copies:
        try:
            most = peak_while(lambda: loop.step(adapted, parts, optimizer, seed=0))
        finally:
            optimizer.zero_grad(set_to_none=True)
        return None if most is None else most - tensor_bytes(copies)


def most_tokens(batches: Sequence[Batch], accumulate: int) -> list[Batch]:
    """Return the parts of the batch that contains the largest part, by number of tokens with padding."""
    return max((batch.parts(accumulate) for batch in batches), key=lambda p: max(part.padded_tokens for part in p))


def copied_B(adapted: Adapted, head: Sequence[nn.Parameter]) -> int:  # noqa: N802  # a unit
    """Return how many bytes `step_peak` copies: trained parameters and buffers."""
    return tensor_bytes([*loop.trainable(adapted, head), *_buffers(adapted)])


@contextmanager
def _restored(adapted: Adapted, trainable: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Undo the changes of a step at the end of the context. Yield the copies that restore the state."""
    saved = [*trainable, *_buffers(adapted)]
    # A module may replace its buffer by a new tensor.
    places = [
        (module, name, buffer)
        for module in adapted.model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    attributes = [vars(module).values() for module in adapted.model.modules()]
    generators = {id(v): v for values in attributes for v in values if isinstance(v, torch.Generator)}.values()
    copies, states = [t.detach().clone() for t in saved], [g.get_state() for g in generators]
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
            for t, copy in zip(saved, copies, strict=True):
                if not torch.equal(t, copy):  # an expanded tensor cannot be written, and is unchanged
                    t.copy_(copy)


def _buffers(adapted: Adapted) -> list[Tensor]:
    """List the buffers that a step may change. Packed constants and PiSSA's residual, for example, are not among them."""
    frozen = {t.untyped_storage().data_ptr() for t in adapted.state().values()}
    return [b for b in adapted.model.buffers() if has_storage(b) and b.untyped_storage().data_ptr() not in frozen]
