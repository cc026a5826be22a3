"""Models on the meta device, with a Method's reference attached, to count tensors without data.

A model's architecture comes from a preset of `harness/assets/shapes.yaml` or from a config.json. Imports torch only
when a model is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harness.assets import shapes
from harness.errors import HarnessError
from harness.methods.peft_config import UNREFERENCED

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""


def config_and_kind(name: str) -> tuple[dict[str, Any], str]:
    """Return the config.json of a model, and the kind of the model: `causal` or `encoder`.

    name: the name of a preset, or the path of a config.json.
    """
    from harness.memory_model import model_shapes

    config, preset = shapes.config_of(name), shapes.preset(name)
    return config, preset.kind if preset else model_shapes.model_kind(config)


@lru_cache(maxsize=32)  # claims about a model are computed in one process, but not always in a row
def model(name: str, split: str = "{}") -> Any:
    """Build a model on the meta device and return it.

    name: the name of a preset, or the path of a config.json. split: the argument `parts` of `split_layers`, as JSON.
    """
    import torch

    from harness.assets import structure

    built = structure.build(*config_and_kind(name), torch.float32)
    built.requires_grad_(False)
    split_layers(built, json.loads(split))
    return built


def split_layers(built: nn.Module, parts: Mapping[str, Sequence[str]]) -> None:
    """Replace each fused layer by one layer per part. Each part gets an equal share of the outputs.

    parts: name of a fused layer -> names of its parts. For example, GPT-2 computes query, key and value in one layer,
    but papers adapt them separately. Raises ValueError if the outputs cannot be divided equally.
    """
    from torch import nn

    for path, layer in list(built.named_modules()):
        names = parts.get(path.rpartition(".")[2])
        if not names:
            continue
        inputs, outputs = sides(layer)
        if outputs % len(names):
            raise ValueError(f"{path} has {outputs} outputs, not divisible by {len(names)} parts")
        share = outputs // len(names)
        each = {name: nn.Linear(inputs, share, bias=layer.bias is not None, device="meta") for name in names}
        parent, _, end = path.rpartition(".")
        setattr(built.get_submodule(parent), end, nn.ModuleDict(each).requires_grad_(False))


def sides(layer: Any) -> tuple[int, int]:
    """Return the number of inputs and the number of outputs of a linear layer, or of GPT-2's Conv1D."""
    return (layer.nx, layer.nf) if hasattr(layer, "nf") else (layer.in_features, layer.out_features)


@contextmanager
def attached(built: Any, method: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """Attach a Method's reference to a model and yield the adapted model. At the end of the context, detach it.

    Raises ValueError for a config that does not fit the model.
    """
    from harness.conformance.subject import configure
    from harness.memory_model import counting

    with counting.attached(built, method, configure(method, dict(config))) as adapted:
        yield adapted


@lru_cache(maxsize=256)
def _tensors(name: str, split: str, method: str, config: str) -> tuple[Shapes, Shapes]:
    if method in UNREFERENCED:
        return _peft_tensors(name, split, method, config)
    from harness.memory_model import equal_blocks

    built = model(name, split)

    def find() -> tuple[Shapes, Shapes]:
        with attached(built, method, json.loads(config)) as adapted:
            own, tensors = {id(p) for p in adapted.parameters()}, adapted.tensors()
            first_name = {id(t): key for key, t in reversed(tensors.items())}  # a tied tensor has several names
            trained = {key: tuple(t.shape) for key, t in tensors.items() if id(t) in own and first_name[id(t)] == key}
            return trained, _storages(adapted.state())

    trained, frozen = equal_blocks.named_facts(built, find)
    return trained, frozen


def _peft_tensors(name: str, split: str, method: str, config: str) -> tuple[Shapes, Shapes]:
    """Return name -> shape for the trained tensors, and for the frozen tensors, of a Method that has no reference.

    peft attaches the Method to a new model. Raises ValueError with peft's message if peft refuses the config.
    """
    import torch

    from harness.conformance.subject import configure
    from harness.memory_model.counting import SkipRandomDraws
    from harness.methods.registry import discover

    attach = discover().find("method", method, "hf-peft")
    try:
        with SkipRandomDraws("meta"):
            adapted = attach(model.__wrapped__(name, split), configure(method, json.loads(config)), torch.Generator())
    except HarnessError as error:
        raise ValueError(error.what) from error
    trained = {key: tuple(t.shape) for key, t in adapted.tensors().items() if t.requires_grad}
    return trained, _storages({key: t for key, t in adapted.state().items() if key not in trained})


def _storages(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return name -> shape for storages. Tensors that share a storage count once.

    The entry of a storage has the name of its first tensor. If the tensors in a storage are slices of a larger tensor,
    the shape is the shape of the larger tensor.
    """
    found: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name, t in tensors.items():
        whole = t if t._base is None else t._base
        found.setdefault(t.untyped_storage()._cdata, (name, tuple(whole.shape)))
    return dict(found.values())


def trained(name: str, method: str, config: Mapping[str, Any], split: Mapping[str, Sequence[str]]) -> Shapes:
    """Return name -> shape for the tensors that a Method trains in a model. A tied tensor occurs once.

    name: the preset of the model, or the path of its config.json. The Method's reference is attached to the model.
    Raises ValueError for a config that does not fit the model.
    """
    return _tensors(name, json.dumps(split), method, json.dumps(config))[0]


def frozen(name: str, method: str, config: Mapping[str, Any], split: Mapping[str, Sequence[str]]) -> Shapes:
    """Return name -> shape for the frozen tensors that a Method adds to a model. Takes the same arguments as `trained`.

    A tensor that layers share, such as either of VeRA's two projections, occurs once.
    """
    return _tensors(name, json.dumps(split), method, json.dumps(config))[1]


def parameters(name: str, split: Mapping[str, Sequence[str]] | None = None) -> dict[str, Tensor]:
    """Return name -> parameter for a model without an adapter. A tied parameter occurs once.

    name: the preset of the model, or the path of its config.json. split: the argument `parts` of `split_layers`.
    """
    return dict(model(name, json.dumps(split or {})).named_parameters())


def parameter_count(name: str) -> int:
    """Return the number of parameters of a model without an adapter. Tied parameters count once."""
    return sum(p.numel() for p in parameters(name).values())
