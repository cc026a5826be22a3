"""transformers' Conv1D, GPT-2's linear layer, which keeps its weight the other way round: written as a linear layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from reference.shared.layers import kind_of, replace

NOTE = "{} Conv1D layers are linear layers here, with the same weights: so every method and base takes them"


def as_linear(model: nn.Module) -> int:
    """Put a linear layer of the same weight, (out, in), and bias into the place of each Conv1D; return their number.

    Most methods, and libraries, are written for linear layers. What is adapted of a Conv1D itself, `check` looks at.
    """
    found = [(path, layer) for path, layer in model.named_modules(remove_duplicate=False) if kind_of(layer) == "Conv1D"]
    made: dict[int, nn.Linear] = {}  # a layer that stands in two places stays one
    for path, layer in found:
        conv1d: Any = layer
        if id(layer) not in made:
            made[id(layer)] = linear = nn.Linear(conv1d.nx, conv1d.nf, device="meta").train(layer.training)
            weight = conv1d.weight.detach().T.contiguous()
            linear.weight = nn.Parameter(weight, requires_grad=conv1d.weight.requires_grad)
            linear.bias = conv1d.bias
        replace(model, path, made[id(layer)])
    return len(made)
