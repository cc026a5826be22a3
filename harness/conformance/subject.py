"""The subject of a check: an implementation attached to a model, and the reference on the same weights."""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.methods import checksums
from harness.methods.peft_config import UNREFERENCED, AdapterConfig
from harness.methods.spec import Adapted, methods
from reference.operations import nf4
from reference.shared.layers import KINDS, dense_weight, targets

if TYPE_CHECKING:
    from harness.conformance.comparison.tolerance_policies import Judgement

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class PackedLayer:
    """A weight in NF4 as its implementation stores it."""

    data: Tensor
    """Bytes of two codes each."""
    absmax: Tensor
    """float32, one per block; decoded if `double`."""
    block: int
    double: bool = False
    """True if absmax is quantised too."""


@dataclass(frozen=True)
class ExpectedCodes:
    """Codes and absmax that the reference quantiser gives for a weight, and the layer's bias."""

    codes: Tensor
    absmax: Tensor
    near_tie: Tensor
    """Mask of the elements for which the last bit of a division decides the code."""
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Linear, block: int = 64) -> ExpectedCodes:
        """Quantise the weight of `layer` by the reference; return its codes and absmax with the unchanged bias."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(*nf4.quantize(layer.weight, block), nf4.near_tie(layer.weight, block), bias)


LARGEST_COPY = 300_000_000
"""Largest number of parameters of a model that is copied. A small machine cannot hold two copies of a larger one, one
of them in float64.
"""


def is_small(model: nn.Module) -> bool:
    """Return whether a model has few enough parameters to be copied, also to float64."""
    return sum(p.numel() for p in model.parameters()) <= LARGEST_COPY


@dataclass(frozen=True)
class Original:
    """The model before attaching. It is a copy, since an implementation may write into the weights that it adapts."""

    model: nn.Module | None
    """The copy; None if the model is too large. The subject's base layers then stand for the original, once `crc32`
    shows that none of them changed.
    """
    crc32: dict[str, int] = field(default_factory=dict)
    """Checksums of every parameter, of its quantisation state, and of every buffer."""

    @classmethod
    def of(cls, model: nn.Module) -> Original:
        """Return a copy of `model`, or only its checksums if it is too large to be copied."""
        if is_small(model):
            return cls(copy.deepcopy(model))
        named = dict(model.named_parameters())
        return cls(
            None,
            checksums.crc32_by_name({**named, **checksums.quantisation_state(named), **dict(model.named_buffers())}),
        )


@dataclass
class ReferenceLayer:
    """The reference's layer that corresponds to one layer of the subject, in the subject's present state."""

    layer: nn.Module
    tensors: dict[str, Tensor]
    adapted: Adapted


@dataclass
class Subject:
    """An implementation attached to a model."""

    method: str
    config: Any
    """The Method's Config, or an AdapterConfig where there is no reference."""
    dtype: str
    model: nn.Module
    adapted: Adapted
    bases: dict[str, nn.Module]
    """Path -> the layer under the adapter, as it was before attaching."""
    own: list[nn.Parameter] = field(default_factory=list)
    """The model's parameters before attaching."""
    original: Original = field(default_factory=lambda: Original(None))
    unpacked: nn.Module | None = field(default=None, kw_only=True)
    """A copy of the model before its base was packed; None if the base is not packed, or if nothing compares the copy."""
    packed: dict[str, PackedLayer] = field(default_factory=dict)
    """Path -> 4-bit form of the base weight, where it is quantised."""
    expected_codes: dict[str, ExpectedCodes] = field(default_factory=dict)
    """Path -> the reference quantiser's codes of the original weight."""
    judged_codes: dict[str, tuple[Judgement, int]] = field(default_factory=dict)
    """Path -> (judgement of its codes, number of ties), for models too large to hold all expected codes at once."""
    disturbed: list[str] = field(default_factory=list)
    """Descriptions of the process-wide settings that attaching changed."""
    reference_cache: dict[tuple[str, str], ReferenceLayer] | None = None
    """(path, dtype) -> the reference's layer, for small models, so that W is decomposed or quantised only once."""

    def tensors_of(self, path: str) -> dict[str, Tensor]:
        """Map short names to the trainable tensors of the layer at `path`."""
        return _select(path, self.adapted.tensors())

    def state(self) -> dict[str, Tensor]:
        """Map canonical names to the Method's own frozen tensors."""
        return self.adapted.state()

    @property
    def trains_plainly(self) -> bool:
        """True if the config has no dropout, so that outputs in training mode are not random and can be compared."""
        return not getattr(self.config, "dropout", 0.0)

    def added(self) -> dict[str, Tensor]:
        """Map canonical names to the trainable tensors that the Method added, without the model's own parameters, which
        train in full fine-tuning.
        """
        own = {id(p) for base in self.bases.values() for p in base.parameters()}
        own |= {id(p) for p in self.own}
        return {name: t for name, t in self.adapted.tensors().items() if id(t) not in own}

    def original_base(self, path: str) -> nn.Module:
        """Return the layer of `original` at `path`, or the subject's own base layer if `original` is no copy."""
        return self.bases[path] if self.original.model is None else self.original.model.get_submodule(path)

    def dense_base(self, path: str, dtype: torch.dtype) -> nn.Module:
        """Return a plain copy of the base layer at `path` in `dtype`. The reference decodes a packed weight."""
        base: Any = self.original_base(path)
        if path not in self.packed:
            return copy.deepcopy(base).to(dtype)  # type: ignore[no-any-return]
        form, shape = self.packed[path], (base.out_features, base.in_features)
        codes = nf4.unpack(form.data, shape[0] * shape[1])
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(nf4.dequantize(codes, form.absmax, form.block).view(shape).to(dtype))
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.detach().to(dtype))
        return dense

    def original_weight(self, path: str) -> Tensor:
        """Return the weight (E, D) of the base layer before attaching, in its own dtype."""
        base: Any = self.original_base(path)
        return dense_weight(base)

    def fresh_reference(self, dtype: str) -> Adapted:
        """Attach the reference to plain copies of all base layers in `dtype`; return it at its own start."""
        model = skeleton({path: self.dense_base(path, DTYPES[dtype]) for path in self.bases})
        return attach_reference(self.method, model, self.config, list(self.bases), torch.Generator().manual_seed(0))

    def reference(self, path: str, dtype: str) -> ReferenceLayer:
        """Return the reference's layer over the base weight at `path` in `dtype`, in the subject's present state."""
        if self.reference_cache is None:
            reference = self._build_reference(path, dtype)
        else:
            if (path, dtype) not in self.reference_cache:
                self.reference_cache[path, dtype] = self._build_reference(path, dtype)
            reference = copy.deepcopy(self.reference_cache[path, dtype])
        mine = self.tensors_of(path) | _select(path, self.state())
        with torch.no_grad():
            for name, tensor in (reference.tensors | _select("layer", reference.adapted.state())).items():
                if name in mine and mine[name].shape == tensor.shape:
                    tensor.copy_(mine[name])
        return reference

    def _build_reference(self, path: str, dtype: str) -> ReferenceLayer:
        alone = nn.Sequential(OrderedDict(layer=self.dense_base(path, DTYPES[dtype])))
        replaced = all(f"{path}.{name}" in self.state() for name in methods()[self.method].spec.start_from_weight)
        config = _quick_start(self.method, self.config) if replaced else self.config
        adapted = attach_reference(self.method, alone, config, ("layer",), torch.Generator().manual_seed(0))
        return ReferenceLayer(adapted.layers["layer"], _select("layer", adapted.tensors()), adapted)


def _select(path: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{path}."
    return {n[len(start) :]: t for n, t in named.items() if n.startswith(start)}


def configure(method: str, config: dict[str, Any]) -> Any:
    """Return the Method's Config with these values; lists become tuples. Raises TypeError for an unknown key."""
    if method in UNREFERENCED:
        return AdapterConfig(**config)
    kind = importlib.import_module(f"reference.{method}").Config
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})


def attach_reference(
    method: str, model: nn.Module, config: Any, names: Iterable[str] | None, generator: torch.Generator
) -> Adapted:
    """Attach the reference and return it. If `names` is given and the config has targets, `names` replaces them."""
    if names is not None and any(f.name == "targets" for f in fields(config)):
        config = replace(config, targets=tuple(names))
    return importlib.import_module(f"reference.{method}").attach(model, config, generator)  # type: ignore[no-any-return]


def adaptable_layers(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Map paths to layers: the config's targets, or every linear layer if the config has no targets."""
    if hasattr(config, "targets"):
        return targets(model, config.targets, KINDS)
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def skeleton(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that has only these layers, at their paths. Attaching to it leaves the real model unchanged."""
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

    Every implementation starts from these tensors, so that training runs can be compared step by step (see
    `load_start`). They include a residual that the start computes from the weight (PiSSA), because the factors of
    another program's SVD do not fit it. To save memory, the result for a large model omits base weights that train
    (GaLore), and is empty if the start has a residual.
    """
    started = _attach_to_skeleton(method, bases, config, generator)
    if started is None:
        return {}
    tensors = started.tensors()
    own = {id(p) for base in bases.values() for p in base.parameters()}
    rest = {
        name: t
        for name, t in started.state().items()
        if name.rpartition(".")[2] in methods()[method].spec.start_from_weight
    }
    large = sum(t.numel() for t in (*tensors.values(), *rest.values())) > LARGEST_COPY
    if large and rest:
        return {}
    return {name: t.detach().clone() for name, t in (tensors | rest).items() if not (large and id(t) in own)}


def drawn_tensors(method: str, bases: Mapping[str, nn.Module], config: Any) -> set[str]:
    """Return the names of the initial tensors over `bases` that the reference draws at random.

    The set is empty if the start is an SVD of the weight.
    """
    if methods()[method].spec.start_from_weight:
        return set()
    one, other = (initial_tensors(method, bases, config, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


def initial_shapes(
    method: str, bases: Mapping[str, nn.Module], config: Any, generator: torch.Generator
) -> dict[str, tuple[int, ...]]:
    """Map the names of the reference's trainable tensors on `bases` to their shapes; empty without an adapter."""
    started = _attach_to_skeleton(method, bases, _quick_start(method, config), generator)
    return {name: tuple(t.shape) for name, t in started.tensors().items()} if started else {}


def _quick_start(method: str, config: Any) -> Any:
    """Return a config with which the reference attaches quickly: only its initial values differ, not its shapes."""
    return replace(config, **methods()[method].spec.quick_start)


def _attach_to_skeleton(
    method: str, bases: Mapping[str, nn.Module], config: Any, generator: torch.Generator
) -> Adapted | None:
    if not hasattr(config, "targets"):
        return None
    return attach_reference(method, skeleton(bases), config, None, generator)


_SAMPLE = 4096


def sampled(tensor: Tensor) -> Tensor:
    """Return a flat copy of at most 4096 evenly spread elements. They show whether training changed the tensor."""
    return tensor.detach().flatten()[:: -(-tensor.numel() // _SAMPLE)].clone()


@torch.no_grad()
def load(adapted: Adapted, values: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None) -> None:
    """Copy `values` into the trainable tensors of the same names, and `state` into the Method's frozen tensors.

    Raises KeyError for a name that `adapted` does not have.
    """
    places = adapted.tensors()
    for name, value in values.items():
        places[name].copy_(value)
    frozen = adapted.state()
    for name, value in (state or {}).items():
        frozen[name].copy_(value)


def load_start(adapted: Adapted, start: Mapping[str, Tensor]) -> None:
    """Load a result of `initial_tensors`. If `adapted` lacks one of the tensors, load nothing: it keeps its own start."""
    state = adapted.state()
    rest = {name: value for name, value in start.items() if name in state}
    tensors = {name: value for name, value in start.items() if name not in rest}
    if tensors.keys() <= adapted.tensors().keys():
        load(adapted, tensors, rest)


@torch.no_grad()
def warm(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
    """Fill every tensor with noise, scaled so that the update is about as large as the weight.

    At LoRA's own start B is zero, so that the gradient of A is zero in wrong code too: a check there would see nothing.
    """
    for tensor in tensors.values():
        tensor.copy_(noise_for(tensor, generator))


def noise_for(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return normal noise in float64 and the tensor's shape, scaled by 1 / sqrt(fan in) so that a matrix about preserves
    lengths.
    """
    spread = (tensor.numel() / tensor.shape[0]) ** -0.5 if tensor.dim() > 1 else 1.0
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * spread
