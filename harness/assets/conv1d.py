"""transformers' Conv1D, GPT-2's linear layer, which keeps its weight the other way round: written as a linear layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from reference.layers import kind_of, replace

NOTE = "{} Conv1D layers are linear layers here, with the same weights: so every method and base takes them"


def as_linear(model: nn.Module) -> int:
    """Put a linear layer of the same weight, (out, in), and bias into the place of each Conv1D; return their number.

    Most methods, and libraries, are written for linear layers. What is adapted of a Conv1D itself, `check` looks at.
    """
    paths = [path for path, layer in model.named_modules() if kind_of(layer) == "Conv1D"]
    for path in paths:
        layer: Any = model.get_submodule(path)
        linear = nn.Linear(layer.nx, layer.nf, device="meta").train(layer.training)
        weight = layer.weight.detach().T.contiguous()
        linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        linear.bias = layer.bias
        replace(model, path, linear)
    return len(paths)
