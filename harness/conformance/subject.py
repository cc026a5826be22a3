"""The subject of a check: an implementation attached to a model, and the reference on the same weights."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.conformance.comparison.stacked_experts import fix_routing, one_by_one
from harness.conformance.normal_noise import noise_for
from harness.methods import checksums
from harness.methods.module_copy import copied
from harness.methods.peft_config import UNREFERENCED, AdapterConfig
from harness.methods.spec import Adapted, method_info
from harness.records.record import ADAPTER_SHA256
from reference.operations import nf4
from reference.shared.layers import KINDS, dense_weight, kind_of, targets

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
    """A weight in NF4, in the form in which the implementation stores it."""

    data: Tensor
    """The packed weight: bytes that hold two codes each."""
    absmax: Tensor
    """One float32 number per block. If `double` is true, these numbers are already decoded."""
    block: int
    double: bool = False
    """True if the implementation stores absmax in 8 bits."""


@dataclass(frozen=True)
class ExpectedCodes:
    """Codes and absmax that the reference quantiser gives for a weight, and the layer's bias."""

    codes: Tensor
    absmax: Tensor
    near_tie: Tensor
    """Mask of the elements so close to the middle between two levels that the last bit of a division decides the code."""
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, block: int = 64, bias: Tensor | None = None) -> ExpectedCodes:
        """Return the reference quantiser's codes and absmax for a weight of any shape, with a copy of the layer's bias."""
        kept = None if bias is None else bias.detach().clone()
        return cls(*nf4.quantize(weight, block), nf4.near_tie(weight, block), kept)


LARGEST_COPY = 300_000_000
"""Largest number of parameters of a model that is copied.

A small machine cannot hold two copies of a larger model, one of them in float64.
"""


def is_small(model: nn.Module) -> bool:
    """Return whether a model has few enough parameters to be copied, even to float64."""
    return sum(p.numel() for p in model.parameters()) <= LARGEST_COPY


@dataclass(frozen=True)
class Original:
    """The model before attaching: a copy, because an implementation may write into the weights that it adapts."""

    model: nn.Module | None
    """Copy of the model. None if the model is too large to be copied.

    In that case, checks use the layers in `Subject.bases`, after `crc32` has shown that attaching did not change them.
    """
    crc32: dict[str, int] = field(default_factory=dict)
    """Name -> checksum of every parameter, quantisation state and buffer. Empty if `model` is a copy."""

    @classmethod
    def of(cls, model: nn.Module) -> Original:
        """Return an Original with a copy of `model`, or only with checksums if `model` is too large to be copied."""
        if is_small(model):
            return cls(copied(model))
        named = dict(model.named_parameters())
        return cls(
            None,
            checksums.crc32_by_name({**named, **checksums.quantisation_state(named), **dict(model.named_buffers())}),
        )


@dataclass
class ReferenceLayer:
    """The reference's layer for one adapted layer of the subject, with the values that the subject's tensors have now."""

    layer: nn.Module
    tensors: dict[str, Tensor]
    adapted: Adapted

    def copy(self) -> ReferenceLayer:
        """Return a deep copy."""
        return copied(self, [self.adapted.model, self.layer])


@dataclass
class Subject:
    """An implementation attached to a model."""

    method: str
    config: Any
    """The Method's Config, or an AdapterConfig if the Method has no reference."""
    dtype: str
    model: nn.Module
    adapted: Adapted
    bases: dict[str, nn.Module]
    """Path of an adapted layer -> the layer that was there before attaching."""
    own: list[nn.Parameter] = field(default_factory=list)
    """The model's parameters before attaching."""
    original: Original = field(default_factory=lambda: Original(None))
    unpacked: nn.Module | None = field(default=None, kw_only=True)
    """A copy of the model before its base weights were packed.

    None if the base weights are not packed, or if no check compares the copy.
    """
    packed: dict[str, PackedLayer] = field(default_factory=dict)
    """Path of a layer whose base weight is quantised -> the weight in 4 bits."""
    expected_codes: dict[str, ExpectedCodes] = field(default_factory=dict)
    """Path of a layer -> the codes that the reference quantiser gives for its original weight."""
    judged_codes: dict[str, tuple[Judgement, int]] = field(default_factory=dict)
    """Path of a layer -> (judgement of its codes, number of codes that differ because two levels are equally near).

    Used instead of `expected_codes` for models that are too large to hold all expected codes at once.
    """
    disturbed: list[str] = field(default_factory=list)
    """Descriptions of the process-wide settings that attaching changed."""
    reference_cache: dict[tuple[str, str], ReferenceLayer] | None = None
    """Cache of `reference`: (path, dtype) -> ReferenceLayer. Building one may take an SVD or a quantisation of the
    weight.

    None for large models, which have no cache.
    """

    def __post_init__(self) -> None:
        """Fix which stacked experts each token uses, so that checks can call such a module with the input alone."""
        for path, base in self.bases.items():
            if kind_of(base) == "experts":
                adapted = self.adapted.layers.get(path)
                for one in (base, self.original_base(path), *(() if adapted is None else (adapted,))):
                    fix_routing(one)

    def tensors_of(self, path: str) -> dict[str, Tensor]:
        """Map names, relative to `path`, to the trainable tensors of the layer at `path`."""
        return _select(path, self.adapted.tensors())

    def state(self) -> dict[str, Tensor]:
        """Map names `<path>.<letter>` to the frozen tensors that the Method made, such as VeRA's A and B."""
        return self.adapted.state()

    @property
    def trains_plainly(self) -> bool:
        """True if the config has no dropout. Outputs in training mode are then not random and can be compared."""
        return not any(value for name, value in vars(self.config).items() if name.endswith("dropout"))

    def added(self) -> dict[str, Tensor]:
        """Map names such as `layers.0.q_proj.A` to the trainable tensors that the Method added.

        The model's own parameters, which train in full fine-tuning, are left out.
        """
        own = {id(p) for base in self.bases.values() for p in base.parameters()}
        own |= {id(p) for p in self.own}
        return {name: t for name, t in self.adapted.tensors().items() if id(t) not in own}

    def original_base(self, path: str) -> nn.Module:
        """Return the layer at `path` in the original model, or the subject's own base layer if there is no copy of the
        original.
        """
        return self.bases[path] if self.original.model is None else self.original.model.get_submodule(path)

    def dense_base(self, path: str, dtype: torch.dtype) -> nn.Module:
        """Return an ordinary layer with the weights of the base layer at `path`, in `dtype`. A packed weight is
        decoded.
        """
        base: Any = self.original_base(path)
        if path not in self.packed:
            dense: nn.Module = copied(base).to(dtype)
            one_by_one(dense, dtype)
            return dense
        form, shape = self.packed[path], (base.out_features, base.in_features)
        codes = nf4.unpack(form.data, shape[0] * shape[1])
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(nf4.dequantize(codes, form.absmax, form.block).view(shape).to(dtype))
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.detach().to(dtype))
        return dense

    def original_weight(self, path: str) -> Tensor:
        """Return the weight (output features, input features) of the base layer before attaching, in its own dtype."""
        base: Any = self.original_base(path)
        return dense_weight(base).detach()

    def fresh_reference(self, dtype: str) -> Adapted:
        """Attach the reference to plain copies of all base layers in `dtype`, and return the result.

        Its tensors have the reference's own initial values.
        """
        model = skeleton({path: self.dense_base(path, DTYPES[dtype]) for path in self.bases})
        return attach_reference(self.method, model, self.config, list(self.bases), torch.Generator().manual_seed(0))

    def reference(self, path: str, dtype: str) -> ReferenceLayer:
        """Return the reference's layer over the base weight at `path`, in `dtype`.

        The layer's tensors have the values that the subject's tensors have now.
        """
        if self.reference_cache is None:
            reference = self._build_reference(path, dtype)
        else:
            if (path, dtype) not in self.reference_cache:
                self.reference_cache[path, dtype] = self._build_reference(path, dtype)
            reference = self.reference_cache[path, dtype].copy()
        mine = self.tensors_of(path) | _select(path, self.state())
        with torch.no_grad():
            for name, tensor in (reference.tensors | _select("layer", reference.adapted.state())).items():
                if name in mine and mine[name].shape == tensor.shape:
                    tensor.copy_(mine[name])
        return reference

    def _build_reference(self, path: str, dtype: str) -> ReferenceLayer:
        alone = nn.Sequential(OrderedDict(layer=self.dense_base(path, DTYPES[dtype])))
        replaced = all(f"{path}.{name}" in self.state() for name in method_info(self.method).spec.start_from_weight)
        config = _quick_start(self.method, self.config) if replaced else self.config
        adapted = attach_reference(self.method, alone, config, ("layer",), torch.Generator().manual_seed(0))
        return ReferenceLayer(adapted.layers["layer"], _select("layer", adapted.tensors()), adapted)


def _select(path: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{path}."
    return {n[len(start) :]: t for n, t in named.items() if n.startswith(start)}


def configure(method: str, config: dict[str, Any], *, drops_unknown: bool = False) -> Any:
    """Return the Method's Config with these values. Lists, and strings for fields that are tuples, become tuples.

    drops_unknown: leave out keys that this Config does not have. Otherwise, an unknown key raises TypeError.
    """
    if method in UNREFERENCED:
        # The hash identifies an imported adapter, and configures nothing.
        return AdapterConfig(**{key: value for key, value in config.items() if key != ADAPTER_SHA256})
    kind = importlib.import_module(f"reference.{method}").Config
    if drops_unknown:
        known = {field.name for field in fields(kind)}
        config = {key: value for key, value in config.items() if key in known}
    lists = {field.name for field in fields(kind) if str(field.type).startswith("tuple")}
    words = {k: (v,) for k, v in config.items() if k in lists and isinstance(v, str)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} | words)


def attach_reference(
    method: str, model: nn.Module, config: Any, names: Iterable[str] | None, generator: torch.Generator
) -> Adapted:
    """Attach the reference to `model` and return the result.

    If the config has targets and `names` is not None, `names` replaces these targets.
    """
    if names is not None and any(f.name == "targets" for f in fields(config)):
        config = replace(config, targets=tuple(names))
    return importlib.import_module(f"reference.{method}").attach(model, config, generator)  # type: ignore[no-any-return]


def adaptable_layers(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Map paths to the layers that the config adapts: its targets, or every linear layer if it has no targets."""
    if hasattr(config, "targets"):
        return targets(model, config.targets, KINDS)
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def skeleton(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that has only these layers, at their paths. Attaching to this module leaves the real model
    unchanged.
    """
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
    """Return the reference's initial adapter tensors for the layers `bases`, by name; {} if the config has no targets.

    Random tensors are drawn from `generator`. Every implementation starts from these tensors, so that training runs can
    be compared step by step (see `load_start`). For PiSSA, the residual of the weight is included, since it fits only
    the factors of the same SVD. If the tensors have more than LARGEST_COPY numbers, the result is {} for a Method with
    a residual, and lacks base weights that train (GaLore).
    """
    started = _attach_to_skeleton(method, bases, config, generator)
    if started is None:
        return {}
    tensors = started.tensors()
    own = {id(p) for base in bases.values() for p in base.parameters()}
    from_weight = method_info(method).spec.start_from_weight
    rest = {name: t for name, t in started.state().items() if name.rpartition(".")[2] in from_weight}
    large = sum(t.numel() for t in (*tensors.values(), *rest.values())) > LARGEST_COPY
    if large and rest:
        return {}
    return {name: t.detach().clone() for name, t in (tensors | rest).items() if not (large and id(t) in own)}


def drawn_tensors(method: str, bases: Mapping[str, nn.Module], config: Any) -> set[str]:
    """Return the names of the initial adapter tensors that the reference draws at random for the layers `bases`.

    The set is empty if the initial tensors come from an SVD of the weight.
    """
    if method_info(method).spec.start_from_weight:
        return set()
    one, other = (initial_tensors(method, bases, config, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


def initial_shapes(
    method: str, bases: Mapping[str, nn.Module], config: Any, generator: torch.Generator
) -> dict[str, tuple[int, ...]]:
    """Map the names of the reference's trainable tensors for the layers `bases` to their shapes.

    If the config has no targets, the result is empty.
    """
    started = _attach_to_skeleton(method, bases, _quick_start(method, config), generator)
    return {name: tuple(t.shape) for name, t in started.tensors().items()} if started else {}


def _quick_start(method: str, config: Any) -> Any:
    """Return a config with which the reference attaches quickly. It changes the initial values, but no shapes."""
    return replace(config, **method_info(method).spec.quick_start)


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
    """Load a result of `initial_tensors` into `adapted`. If `adapted` lacks one of the tensors, nothing is loaded."""
    state = adapted.state()
    rest = {name: value for name, value in start.items() if name in state}
    tensors = {name: value for name, value in start.items() if name not in rest}
    if tensors.keys() <= adapted.tensors().keys():
        load(adapted, tensors, rest)


@torch.no_grad()
def warm(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
    """Fill every tensor with noise, scaled so that the update is about as large as the weight.

    At LoRA's own start B is zero. The gradient of A is then zero even in wrong code, so a check would see nothing.
    """
    for tensor in tensors.values():
        tensor.copy_(noise_for(tensor, generator))
