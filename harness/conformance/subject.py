"""What is judged: an implementation attached to a model, and the reference built beside it on the same weights."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.methods import Adapted
from reference import nf4
from reference.layers import targets

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Packed:
    """A weight in NF4 as its implementation stores it: bytes (two codes each), float32 absmax per block, block size."""

    data: Tensor
    absmax: Tensor
    block: int


@dataclass(frozen=True)
class ExpectedCodes:
    """What the reference quantiser makes of a weight, and where the last bit of a division decides the code."""

    codes: Tensor
    absmax: Tensor
    near_tie: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Linear) -> ExpectedCodes:
        """Quantise the weight of `layer` by the reference; its bias is to stay as it is."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(*nf4.quantize(layer.weight), nf4.near_tie(layer.weight), bias)


@dataclass
class Subject:
    """An implementation attached to a model.

    bases: path -> the linear layer under the adapter, as it was before attaching; model_parameters: the model's own, of
    before attaching; packed: path -> its 4-bit form, where
    quantised; expected_codes: path -> what the reference quantiser makes of the original weight.
    """

    method: str
    config: Any
    dtype: str
    model: nn.Module
    adapted: Adapted
    bases: dict[str, nn.Linear]
    model_parameters: list[nn.Parameter] = field(default_factory=list)
    packed: dict[str, Packed] = field(default_factory=dict)
    expected_codes: dict[str, ExpectedCodes] = field(default_factory=dict)

    def tensors_of(self, path: str) -> dict[str, Tensor]:
        """Map short names to the trainable tensors of the layer at `path`."""
        start = f"{path}."
        return {n[len(start) :]: t for n, t in self.adapted.tensors().items() if n.startswith(start)}

    @property
    def trains_plainly(self) -> bool:
        """Whether training mode draws no random numbers, so that it can be compared: without dropout."""
        return not getattr(self.config, "dropout", 0.0)

    def added(self) -> dict[str, Tensor]:
        """Map canonical names to the tensors that the Method added: not those of the model itself (full fine-tuning)."""
        own = {id(p) for base in self.bases.values() for p in base.parameters()}
        own |= {id(p) for p in self.model_parameters}
        return {name: t for name, t in self.adapted.tensors().items() if id(t) not in own}

    def base_weight(self, path: str) -> Tensor:
        """Return the base matrix (out, in) in float64, decoded by the reference if it is packed."""
        base: Any = self.bases[path]
        if path not in self.packed:
            return base.weight.detach().double()  # type: ignore[no-any-return]
        form = self.packed[path]
        codes = nf4.unpack(form.data, base.in_features * base.out_features)
        return nf4.dequantize(codes, form.absmax, form.block).view(base.out_features, base.in_features).double()

    def reference(self, path: str, dtype: str) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return (layer, tensors): the reference's layer on this base weight in `dtype`, in the subject's present state."""
        base: Any = self.bases[path]
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.base_weight(path).to(DTYPES[dtype]))
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.detach().to(DTYPES[dtype]))
        alone = nn.Sequential(OrderedDict(layer=dense))
        adapted = attach_reference(self.method, alone, self.config, ("layer",), torch.Generator().manual_seed(0))
        tensors = {n.removeprefix("layer."): t for n, t in adapted.tensors().items()}
        mine = self.tensors_of(path)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in mine and mine[name].shape == tensor.shape:
                    tensor.copy_(mine[name])
        return adapted.layers["layer"], tensors


def configure(method: str, config: dict[str, Any]) -> Any:
    """Return the Method's Config with `config`'s values; lists become tuples. Raises TypeError for an unknown key."""
    kind = importlib.import_module(f"reference.{method}").Config
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})


def attach_reference(
    method: str, model: nn.Module, config: Any, names: Iterable[str] | None, generator: torch.Generator
) -> Adapted:
    """Attach the reference; `names` replaces the config's targets, if it has any."""
    if names is not None and any(f.name == "targets" for f in fields(config)):
        config = replace(config, targets=tuple(names))
    return importlib.import_module(f"reference.{method}").attach(model, config, generator)  # type: ignore[no-any-return]


def linear_layers(model: nn.Module, config: Any) -> dict[str, nn.Linear]:
    """Map path to layer: the config's targets, or every linear layer if the Method names none."""
    if hasattr(config, "targets"):
        return targets(model, config.targets)
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def skeleton(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that holds just these layers, by their paths: a model to attach to without touching the real one."""
    root = nn.Module()
    for path, layer in layers.items():
        parent = root
        *parents, name = path.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, layer)
    return root


def initial_tensors(
    method: str, bases: Mapping[str, nn.Module], config: Any, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the reference's initial adapter tensors over `bases`, drawn from `generator`; empty without an adapter.

    Every implementation starts from these, so that their training runs can be compared step by step.
    """
    if not hasattr(config, "targets"):
        return {}
    adapted = attach_reference(method, skeleton(bases), config, None, generator)
    return {name: t.detach().clone() for name, t in adapted.tensors().items()}


@torch.no_grad()
def load(adapted: Adapted, values: dict[str, Tensor]) -> None:
    """Copy `values` into the trainable tensors of the same names. Raises KeyError for a name that is not there."""
    mine = adapted.tensors()
    for name, value in values.items():
        mine[name].copy_(value)


@torch.no_grad()
def warm(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
    """Fill every tensor with noise, scaled so that the update is as large as what it updates.

    At LoRA's own start B is zero, so the gradient of A is zero whatever the code does: a check there is blind.
    """
    for tensor in tensors.values():
        spread = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * spread)
