"""Attach a Method's reference to a shape on the meta device, to count its tensors without data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from harness.assets import shapes, structure
from harness.conformance.subject import configure
from harness.memory_model import counting, model_shapes


@lru_cache(maxsize=4)
def model(name: str, split: str = "{}") -> Any:
    """Return the model of a shape on the meta device. split: as in `split_layers`, in JSON."""
    config = shapes.config_of(name)
    preset = shapes.preset(name)
    built = structure.build(config, preset.kind if preset else model_shapes.model_kind(config), torch.float32)
    built.requires_grad_(False)
    split_layers(built, json.loads(split))
    return built


def split_layers(built: nn.Module, parts: Mapping[str, Sequence[str]]) -> None:
    """Replace each layer named by a key by one layer per part, each with an equal share of its outputs.

    GPT-2 computes query, key and value in one product; papers adapt them separately. Raises ValueError if the outputs cannot
    be divided equally.
    """
    for path, layer in list(built.named_modules()):
        names = parts.get(path.rpartition(".")[2])
        if not names:
            continue
        inputs, outputs = (layer.nx, layer.nf) if hasattr(layer, "nf") else (layer.in_features, layer.out_features)
        if outputs % len(names):
            raise ValueError(f"{path} has {outputs} outputs, not divisible by {len(names)} parts")
        each = nn.ModuleDict(
            {
                name: nn.Linear(inputs, outputs // len(names), bias=layer.bias is not None, device="meta")
                for name in names
            }
        )
        parent = built.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], each.requires_grad_(False))


@lru_cache(maxsize=256)
def _trained(name: str, split: str, method: str, config: str) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]:
    built = model(name, split)
    with counting.attached(built, method, configure(method, json.loads(config))) as adapted:
        own = {id(p) for p in adapted.parameters()}
        once = {id(t): key for key, t in reversed(adapted.tensors().items())}  # a tied tensor has several names
        trained = tuple(
            (key, tuple(t.shape)) for key, t in adapted.tensors().items() if id(t) in own and once[id(t)] == key
        )
        frozen = _once(adapted.state())
    return trained, frozen


def _once(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return name and shape of each storage once: layers may share one, and use slices of it."""
    found: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name, t in tensors.items():
        whole = t if t._base is None else t._base
        found.setdefault(t.untyped_storage()._cdata, (name, tuple(whole.shape)))
    return tuple(found.values())


def trained(name: str, method: str, config: Mapping[str, Any], split: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Map trainable tensors to shapes, each tensor once, with the Method's reference attached to a shape.

    Raises ValueError for a config that does not fit the model.
    """
    return dict(_trained(name, json.dumps(split), method, json.dumps(config))[0])


def frozen(name: str, method: str, config: Mapping[str, Any], split: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Map frozen tensors of the Method to shapes; tensors that layers share (VeRA's pair) once."""
    return dict(_trained(name, json.dumps(split), method, json.dumps(config))[1])


def parameters(name: str, split: Mapping[str, Sequence[str]] | None = None) -> dict[str, Tensor]:
    """Map the names of a shape's parameters to the parameters, a tied one once."""
    return dict(model(name, json.dumps(split or {})).named_parameters())
