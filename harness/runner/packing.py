"""A Cell's base in 4 bits: which layers are packed, by whom, and what must come of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from harness.conformance.subject import ExpectedCodes, Packed
from harness.errors import UsageError
from harness.records import Base
from harness.registry import Registry
from reference.layers import kind_of, replace

_CONV1D = "Conv1D"


def packable(model: nn.Module, config: Any, matched: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return the layers that a quantised base packs: those that the Method adapts, or every one of the model.

    matched: what `adaptable_layers` gives, which of a Method without targets leaves Conv1D out: a GPT-2 would have nothing
    but its output layer packed.
    """
    found = dict(matched)
    if not hasattr(config, "targets"):
        found |= {path: layer for path, layer in model.named_modules() if kind_of(layer) == _CONV1D}
    return found


def pack(
    model: Any, paths: Iterable[str], base: Base, dtype: torch.dtype, registry: Registry
) -> tuple[dict[str, Packed], dict[str, ExpectedCodes], str]:
    """Pack the layers at `paths` in place; return what they hold, what they should hold, and a sentence for the Record.

    Raises UsageError for a layer that is not linear, before anything is packed.
    """
    layers = {path: model.get_submodule(path) for path in paths}
    for path, layer in layers.items():
        if kind_of(layer) not in ("linear", _CONV1D):
            raise UsageError(
                f"`targets` name {path} ({type(layer).__name__}); a base in {base.quantization} packs linear layers only",
                mend="name linear layers, or leave out `base:`",
            )
    weights = sum(parameter.numel() for parameter in model.parameters())
    for path, layer in layers.items():
        if kind_of(layer) == _CONV1D:
            replace(model, path, _linear(layer))
    expected = {path: ExpectedCodes.of(model.get_submodule(path)) for path in layers}
    forms = registry.find("base", base.quantization, base.implementation)(model, list(layers), dtype)
    packed = {path: Packed(*form) for path, form in forms.items()}
    count = sum(codes.codes.numel() for codes in expected.values())
    said = (
        f"base {base.quantization}: {len(layers)} layers with {count:,} of the model's {weights:,} weights are packed"
    )
    return packed, expected, said


def _linear(layer: Any) -> nn.Linear:
    """Return a linear layer that computes what a Conv1D does, which keeps its weight as (in, out).

    Blocks then run along the input features, as those of every other layer, and as transformers packs a Conv1D itself.
    """
    dense = nn.Linear(layer.nx, layer.nf, device="meta").train(layer.training)
    dense.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    dense.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return dense
