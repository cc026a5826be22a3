"""Convert transformers' Conv1D to `nn.Linear`. GPT-2 uses Conv1D, which is a linear layer with a transposed weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from reference.shared.layers import kind_of, replace

NOTE = "{} Conv1D layers are linear layers here, with the same weights, so that every method and base supports them"


def as_linear(model: nn.Module) -> int:
    """Replace each Conv1D of a model by a linear layer, and return the number of replaced layers.

    The linear layer has the same bias, and the transposed weight of shape (out, in). Most Methods and libraries adapt
    only linear layers. The command `check` does not replace Conv1D layers, because it also tests adapters of Conv1D.
    """
    found = [(path, layer) for path, layer in model.named_modules(remove_duplicate=False) if kind_of(layer) == "Conv1D"]
    made: dict[int, nn.Linear] = {}  # so that a shared layer stays shared
    for path, layer in found:
        conv1d: Any = layer
        if id(layer) not in made:
            made[id(layer)] = linear = nn.Linear(conv1d.nx, conv1d.nf, device="meta").train(layer.training)
            weight = conv1d.weight.detach().T.contiguous()
            linear.weight = nn.Parameter(weight, requires_grad=conv1d.weight.requires_grad)
            linear.bias = conv1d.bias
        replace(model, path, made[id(layer)])
    return len(made)
