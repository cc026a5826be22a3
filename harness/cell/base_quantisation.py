"""Quantise the base model of a Cell to 4 bits, and keep the data by which the parity gate judges the 4-bit codes.

The parity gate compares the adapted model with a float64 reference before training. A model is large if it is too large
to be copied (`harness.conformance.subject.is_small`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.conformance.comparison.packed_codes import judge_in_pieces
from harness.conformance.comparison.tolerance_policies import Judgement
from harness.conformance.packing import pack as pack_layers
from harness.conformance.subject import ExpectedCodes, PackedLayer, is_small
from harness.errors import UsageError
from harness.methods.registry import Registry
from harness.records.record import Base
from reference.shared.layers import kind_of


@dataclass
class PackedBase:
    """The packed (4-bit) layers of a model. The keys of every dict are paths of layers.

    `expected` and `judged` are empty if the gate of an earlier Cell has judged the codes.
    """

    forms: dict[str, PackedLayer] = field(default_factory=dict)
    expected: dict[str, ExpectedCodes] = field(default_factory=dict)
    """The codes and constants that the reference quantiser gives for each layer; empty for a large model."""
    judged: dict[str, tuple[Judgement, int]] = field(default_factory=dict)
    """For a large model: path -> (verdict on the layer's codes, number of codes that depend on rounding, i.e. ties).
    Both are computed while the layer is packed. Empty for a small model."""
    note: str = ""
    """A sentence for the Record: how many layers and weights are packed."""


def unpackable_target(layers: Mapping[str, nn.Module]) -> str:
    """Return the reason why a 4-bit base excludes these layers, by path. Empty if all are linear."""
    return next(
        (
            f"`targets` name {path} ({type(layer).__name__}); a 4-bit base packs linear layers only"
            for path, layer in layers.items()
            if kind_of(layer) != "linear"
        ),
        "",
    )


def pack(
    model: nn.Module,
    paths: Iterable[str],
    base: Base,
    dtype: torch.dtype,
    registry: Registry,
    ready: Iterable[Collection[str]] | None = None,
    *,
    judge: bool = True,
) -> PackedBase:
    """Pack the layers at `paths` in place (to 4 bits), and return their packed forms.

    The layers are packed one by one, so that at most one layer is in memory both as a dense and as a packed layer.
    ready: an iterator that gives a group of modules their weights, and then yields the paths of this group. None: all
    modules already have weights. judge: whether to keep the data by which the parity gate judges the codes. Raises
    UsageError, before any layer is packed, if one of the layers is not linear.
    """
    paths = list(paths)
    if reason := unpackable_target({path: model.get_submodule(path) for path in paths}):
        raise UsageError(reason, hint="name linear layers, or leave out `base:`")
    weights, small = sum(parameter.numel() for parameter in model.parameters()), is_small(model)
    packs = registry.find("base", base.quantization, base.implementation)
    found, count = PackedBase(), 0
    for filled in ready or [paths]:
        for path in (path for path in paths if path in filled):
            layer: Any = model.get_submodule(path)
            if small and judge:
                found.expected[path] = ExpectedCodes.of(layer.weight, bias=layer.bias)
            found.forms[path] = pack_layers(packs, model, [path], dtype)[path]
            if not small and judge:
                packed: Any = model.get_submodule(path)
                found.judged[path] = judge_in_pieces(found.forms[path], layer, packed.bias)
            count += layer.weight.numel()
            del layer
    found.note = (
        f"base {base.quantization}: {len(paths)} layers with {count:,} of the model's {weights:,} weights are packed"
    )
    return found
