"""Observations: a layer's output and gradients, and the output of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def observe(
    layer: nn.Module,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    dy: Tensor,
    *,
    training: bool = False,
    call: Callable[..., Tensor] = nn.Module.__call__,
) -> dict[str, Tensor]:
    """Run `layer` forward on x and backward from dy, and return the output and the gradients.

    The output is `y`. The gradients are `grad x` and, for each of `tensors`, `grad <name>`. A gradient that does not
    exist is missing from the result, and a comparison then fails. If dy does not have the shape of y, all gradients are
    missing. The gradients that the layer's tensors had before are restored.

    x: (..., D), or token numbers. dy: gradient of y, (..., E). training: run in training mode, otherwise in eval mode.
    tensors: short name -> trainable tensor of the layer. call: function that gets the layer and x, and returns y. Raises
    TypeError if y is no tensor.
    """
    leaf = strided_copy(x).requires_grad_(x.is_floating_point())
    with preserved_state(layer, tensors, training):
        y = call(layer, leaf)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"an adapted layer should return a tensor; {type(layer).__name__} returned {type(y).__name__}"
            )
        if y.requires_grad and y.shape == dy.shape:
            y.backward(dy)
        seen = {"y": y.detach().clone()}
        if leaf.grad is not None:
            seen["grad x"] = leaf.grad.detach().clone()
        for name, tensor in tensors.items():
            if tensor.grad is not None:
                seen[f"grad {name}"] = tensor.grad.detach().clone()
        return seen


def strided_copy(x: Tensor) -> Tensor:
    """Return a copy of x with the same strides. `clone` would close gaps between the rows."""
    return x.new_empty(0).set_(x.untyped_storage().clone(), x.storage_offset(), x.size(), x.stride())


@contextmanager
def preserved_state(layer: nn.Module, tensors: Mapping[str, Tensor], training: bool) -> Iterator[None]:
    """Put `layer` into the given training mode inside the context, and remove the gradients of its tensors.

    Afterwards the old mode and the old gradients are restored.
    """
    held, was_training = {name: t.grad for name, t in tensors.items()}, layer.training
    layer.train(training)
    for tensor in tensors.values():
        tensor.grad = None
    try:
        yield
    finally:
        layer.train(was_training)
        for name, tensor in tensors.items():
            tensor.grad = held[name]


def inference(model: nn.Module, forward: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    """Return a function that runs `forward(model)` in inference mode, and returns the output.

    During the run, no parameter requires a gradient. Otherwise torch may choose another matrix product, even in
    inference mode, and round differently.
    """

    def run() -> Tensor:
        trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            with torch.inference_mode():
                return forward(model).clone()
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    return run
