"""Take one more training step to count its memory, tensor by tensor. Undo its changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
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
    take_step: Callable[..., object] = loop.step,
) -> int | None:
    """Take one more training step. Return its peak bytes of CPU tensors, or None if torch cannot count them.

    The step uses the batch that puts the most tokens into the model at once. The optimizer already has its states. The
    step is not timed, because counting slows it down. Some optimizers do extra work in certain steps, such as GaLore's
    SVD. This work is counted only if it is due in this step, the first one after the training. The Method's
    `after_step` is not called. take_step: function that takes the step, with the parameters of `loop.step`.

    At the end, even after an error, the function restores three things: the trained parameters; the model's buffers,
    such as the statistics of a BatchNorm; and the random states of torch, Python, numpy and the generators that are
    attributes of modules. It does not restore the optimizer, other state such as a counter or a generator in a closure,
    or untrained buffers of the Method, which may be as large as the weights. At the end there are no gradients.
    """
    parts = most_tokens(batches, accumulate)
    optimizer.zero_grad(set_to_none=True)
    with _restored(adapted, loop.trainable(adapted, head)) as copies:
        try:
            most = peak_while(lambda: take_step(adapted, parts, optimizer, seed=0))
        finally:
            optimizer.zero_grad(set_to_none=True)
        return None if most is None else most - tensor_bytes(copies)


def most_tokens(batches: Sequence[Batch], accumulate: int) -> list[Batch]:
    """Divide each batch into `accumulate` parts. Return the parts of the batch that has the largest part.

    The size of a part is its number of tokens, with padding.
    """
    return max((batch.parts(accumulate) for batch in batches), key=lambda p: max(part.padded_tokens for part in p))


def copied_B(adapted: Adapted, head: Sequence[nn.Parameter]) -> int:  # noqa: N802  # a unit
    """Return how many bytes `step_peak` copies to restore the trained parameters and the buffers."""
    return tensor_bytes([*loop.trainable(adapted, head), *_buffers(adapted)])


@contextmanager
def _restored(adapted: Adapted, trainable: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Copy the state that a step may change, and yield the copies. At the end of the context, restore the state."""
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
    """List the buffers that a step may change. The Method's untrained buffers, such as a residual, are left out."""
    frozen = {t.untyped_storage().data_ptr() for t in adapted.state().values()}
    return [b for b in adapted.model.buffers() if has_storage(b) and b.untyped_storage().data_ptr() not in frozen]
