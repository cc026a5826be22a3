"""A Cell's base in 4 bits: which layers are packed, by whom, and what must come of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.conformance.packed_codes import judge_in_pieces
from harness.conformance.subject import ExpectedCodes, Packed, is_small
from harness.conformance.tolerance import Judgement
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


@dataclass
class PackedBase:
    """What the packed layers hold, by path, and what shows that it is right.

    expected: the codes that the reference quantiser makes; or of a large model, for which these would take half as much
    memory as its weights, judged: how each layer's codes were judged as it was packed. said: a sentence for the Record.
    """

    forms: dict[str, Packed] = field(default_factory=dict)
    expected: dict[str, ExpectedCodes] = field(default_factory=dict)
    judged: dict[str, tuple[Judgement, int]] = field(default_factory=dict)
    said: str = ""


def pack(
    model: Any,
    paths: Iterable[str],
    base: Base,
    dtype: torch.dtype,
    registry: Registry,
    ready: Iterable[Collection[str]] | None = None,
) -> PackedBase:
    """Pack the layers at `paths` in place, one by one: no more than one is there in both forms.

    ready: yields paths of modules as soon as they have their weights, for a model that gets them meanwhile (None: all have
    them). Raises UsageError for a layer that is not linear, before anything is packed.
    """
    paths = list(paths)
    for path in paths:
        layer = model.get_submodule(path)
        if kind_of(layer) not in ("linear", _CONV1D):
            raise UsageError(
                f"`targets` name {path} ({type(layer).__name__}); a base in {base.quantization} packs linear layers only",
                mend="name linear layers, or leave out `base:`",
            )
    weights, small = sum(parameter.numel() for parameter in model.parameters()), is_small(model)
    packs = registry.find("base", base.quantization, base.implementation)
    found, count = PackedBase(), 0
    for here in ready or [paths]:
        for path in (path for path in paths if path in here):
            if kind_of(layer := model.get_submodule(path)) == _CONV1D:
                replace(model, path, layer := _linear(layer))
            if small:
                found.expected[path] = ExpectedCodes.of(layer)
            found.forms[path] = Packed(*packs(model, [path], dtype)[path])
            if not small:
                found.judged[path] = judge_in_pieces(found.forms[path], layer, model.get_submodule(path).bias)
            count += layer.weight.numel()
            del layer
    found.said = (
        f"base {base.quantization}: {len(paths)} layers with {count:,} of the model's {weights:,} weights are packed"
    )
    return found


def _linear(layer: Any) -> nn.Linear:
    """Return a linear layer that computes what a Conv1D does, which keeps its weight as (in, out).

    Blocks then run along the input features, as those of every other layer, and as transformers packs a Conv1D itself.
    """
    dense = nn.Linear(layer.nx, layer.nf, device="meta").train(layer.training)
    dense.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    dense.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return dense
