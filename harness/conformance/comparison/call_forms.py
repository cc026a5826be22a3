"""Ways to call an adapted layer: shapes and layouts of the input, modes of torch, copies, repetition and threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.conformance.comparison.observations import observe, preserved_state

ROWS = 4
REPEATS = 110
"""Number of calls of one layer. This is enough to find a fault that shows in every 100th call."""
THREADS = 2


@dataclass(frozen=True)
class Call:
    """One layer, and an input for it with its incoming gradient."""

    layer: nn.Module
    tensors: Mapping[str, Tensor]
    x: Tensor
    """The input: rows of features (ROWS, D), token numbers (ROWS,), or a few images."""
    dy: Tensor
    training: bool
    """True if training mode is tried, because the layer has no dropout and must compute the same in both modes."""

    def observe(self, x: Tensor, dy: Tensor, layer: nn.Module | None = None, **how: Any) -> dict[str, Tensor]:
        """Run the layer forward from `x` and backward from `dy`, and return the output and the gradients.

        The output has the shape of `self.dy`, and the gradient of the input has the shape of `self.x`. layer: if given,
        the copy of the layer that is run instead.
        """
        tensors = self.tensors if layer is None else tensors_of_copy(self.layer, layer, self.tensors)
        seen = observe(layer or self.layer, tensors, x, dy, training=self.training, **how)
        if seen["y"].shape == dy.shape:
            seen["y"] = seen["y"].reshape(self.dy.shape)
        if "grad x" in seen:
            seen["grad x"] = seen["grad x"].reshape(self.x.shape)
        return seen

    def output(self, training: bool) -> dict[str, Tensor]:
        """Run the layer in training mode or eval mode, and return only the output."""
        with preserved_state(self.layer, self.tensors, training):
            return {"y": self.layer(self.x).detach().clone()}


Form = Callable[[Call], dict[str, Tensor]]


def _reshaped(*shape: int) -> Form:
    return lambda call: call.observe(call.x.reshape(*shape, -1), call.dy.reshape(*shape, -1))


def _swapped(call: Call) -> dict[str, Tensor]:
    """Call the layer with an input of three dimensions whose batch and tokens are swapped in memory."""
    x, dy = (t.reshape(2, 2, -1).transpose(0, 1).contiguous().transpose(0, 1) for t in (call.x, call.dy))
    return call.observe(x, dy)


def _sliced(call: Call) -> dict[str, Tensor]:
    """Call the layer with an input that is every second row of a larger tensor."""
    wide = torch.stack([call.x, torch.full_like(call.x, torch.nan)], dim=1).flatten(0, 1)
    return call.observe(wide[::2], call.dy)


def _no_grad(call: Call) -> dict[str, Tensor]:
    with torch.no_grad():
        return call.output(call.training)


def _inference(call: Call) -> dict[str, Tensor]:
    with torch.inference_mode():
        return call.output(training=False)


def constant_input(call: Call) -> dict[str, Tensor]:
    """Call the layer with an input that needs no gradient, as the first layer of a model gets it."""
    return call.observe(call.x, call.dy, call=lambda layer, x: layer(x.detach()))


def _frozen(call: Call) -> dict[str, Tensor]:
    """Call the layer while its trained tensors require no gradient."""
    for tensor in call.tensors.values():
        tensor.requires_grad_(False)
    try:
        return call.output(call.training)
    finally:
        for tensor in call.tensors.values():
            tensor.requires_grad_(True)


def _checkpointed(call: Call) -> dict[str, Tensor]:
    return call.observe(call.x, call.dy, call=partial(checkpoint, use_reentrant=False))


def copied(call: Call) -> dict[str, Tensor]:
    """Call a deep copy of the layer."""
    return call.observe(call.x, call.dy, layer=copy.deepcopy(call.layer))


def _compiled(call: Call) -> dict[str, Tensor]:
    """Call the layer through torch.compile, without code generation: the traced graph computes forward and backward."""
    torch.compiler.reset()
    try:
        return call.observe(call.x, call.dy, call=lambda layer, x: torch.compile(layer, backend="aot_eager")(x))
    finally:
        torch.compiler.reset()


def _repeated(call: Call) -> dict[str, Tensor]:
    """Call the layer many times in its mode, and return an output that differs from the first output.

    If no output differs, return the first.
    """
    first = call.output(call.training)
    later = (call.output(call.training) for _ in range(REPEATS))
    return next((one for one in later if not torch.equal(one["y"], first["y"])), first)


def _threaded(call: Call) -> dict[str, Tensor]:
    """Call the layer in several threads at once, and return an output that differs from a call without threads.

    Each thread has its own input. Only outputs for `call.x` are returned. If none differs, return the output without
    threads.
    """
    gate = Barrier(THREADS)

    def run(x: Tensor) -> list[Tensor]:
        gate.wait()
        with torch.no_grad():
            return [call.layer(x).clone() for _ in range(8)]

    with preserved_state(call.layer, call.tensors, training=False):
        with torch.no_grad():
            alone = call.layer(call.x).clone()
        others = [call.x, *(call.x.flip(0) for _ in range(THREADS - 1))]
        with ThreadPoolExecutor(THREADS) as threads:
            mine = next(iter(list(threads.map(run, others))))
    return {"y": next((one for one in mine if not torch.equal(one, alone)), alone)}


def _channels_last(call: Call) -> dict[str, Tensor]:
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (call.x, call.dy))
    return call.observe(x, dy)


FORMS_OF_IMAGES: dict[str, Form] = {"channels_last": _channels_last}
"""Name -> function that calls a layer on its images in another memory layout."""
FORMS_OF_ROWS: dict[str, Form] = {
    "one token per sequence": _reshaped(ROWS, 1),
    "four dimensions": _reshaped(2, 1, 2),
    "batch and tokens transposed": _swapped,
    "every second row of a tensor": _sliced,
}
"""Name -> function that calls a layer on its rows of features in another shape or memory layout."""
FORMS: dict[str, Form] = {
    "under no_grad in training mode": _no_grad,
    "under inference_mode": _inference,
    "with an input that needs no gradient": constant_input,
    "with frozen tensors": _frozen,
    "under activation checkpointing": _checkpointed,
    "by a deep copy": copied,
}
"""Name -> function that calls a layer on its input in another mode."""
LONG_FORMS: dict[str, Form] = {
    "under torch.compile": _compiled,
    f"{REPEATS} times": _repeated,
    f"in {THREADS} threads": _threaded,
}
"""Name -> function that calls a layer on its input many times. Only the first layer of a model is called so."""
WITHOUT_GRADIENTS = (_no_grad, _inference, _frozen, _repeated, _threaded)
"""Functions of FORMS and LONG_FORMS that return only an output, without gradients."""


def owns(layer: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether all of `tensors` are parameters of the layer. If not, a copy of the layer does not copy them."""
    return {id(t) for t in tensors.values()} <= {id(p) for p in layer.parameters()}


def tensors_of_copy(layer: nn.Module, other: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of `other` that correspond to `tensors`, by the same names.

    `tensors` are parameters of `layer`, and `other` is a copy of `layer`.
    """
    names = {id(t): name for name, t in layer.named_parameters(remove_duplicate=False)}
    copies: dict[str, Tensor] = dict(other.named_parameters(remove_duplicate=False))
    return {name: copies[names[id(t)]] for name, t in tensors.items() if id(t) in names}
