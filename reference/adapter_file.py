"""Compute the weights that a LoRA adapter file in HF peft's format gives to a base model. Not a Method.

    W' = W + s B A                                s = alpha / r, with use_rslora s = alpha / sqrt(r)
    W' = m (W + s B A) / ||W + s B A||            use_dora, one m per output
    b' = b + s c                                  lora_bias, c is stored as lora_B.bias

W is a weight of the base model, the base for short. The rank r and alpha of a layer may come from rank_pattern and
alpha_pattern. Other tensors of a file replace parameters of the base: modules_to_save, biases, and base weights that
were saved with the adapter. Shape letters: D input features, E output features, R rank, K experts.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from reference.dora import gain, norms
from reference.shared.layers import CONVOLUTIONS, KINDS, WORDS, kind_of

PREFIX = "base_model.model."
"""Beginning of every key of an adapter file."""
ALL_LINEAR = "all-linear"
_EXPERT = re.compile(r"(?P<block>.+)\.(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)")
_STACKED = {
    "w1": ("gate_up_proj", 0), "gate_proj": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", None), "down_proj": ("down_proj", None),
}  # fmt: skip
"""Layer of one expert -> the parameter that stacks this layer of all experts, and the half of it (`LayerUpdate.half`)."""


@dataclass(frozen=True)
class AdapterSettings:
    """The keys of an adapter_config.json on which the adapted weights depend. Each field has the name of its key."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    task_type: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AdapterSettings:
        """Return the settings in the content of an adapter_config.json. A missing key or null gives the default."""
        names = [one.name for one in fields(cls)]
        return cls(**{name: config[name] for name in names if config.get(name) is not None})

    @property
    def replaced_modules(self) -> tuple[str, ...]:
        """Names of the modules that the file replaces: modules_to_save, and heads by task_type, e.g. `score` for SEQ_CLS."""
        scored = ("classifier", "score")
        heads = {"SEQ_CLS": scored, "TOKEN_CLS": scored, "QUESTION_ANS": ("qa_outputs",)}
        return (*(self.modules_to_save or ()), *heads.get(self.task_type or "", ()))

    def rank(self, name: str) -> int:
        """Return the rank of the layer or parameter `name`, from rank_pattern or r."""
        return self.rank_pattern.get(_matching(self.rank_pattern, name), self.r)

    def alpha(self, name: str) -> float:
        """Return alpha of the layer or parameter `name`, from alpha_pattern or lora_alpha."""
        return self.alpha_pattern.get(_matching(self.alpha_pattern, name), self.lora_alpha)

    def scaling(self, name: str) -> float:
        """Return s, the factor on B A, for the layer or parameter `name`."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def scaled(self, factor: float) -> AdapterSettings:
        """Return these settings with the scaling of every layer multiplied by `factor`."""
        alphas = {name: factor * alpha for name, alpha in self.alpha_pattern.items()}
        return replace(self, lora_alpha=factor * self.lora_alpha, alpha_pattern=alphas)

    def excludes(self, path: str) -> bool:
        """Return whether exclude_modules or modules_to_save matches this path, so that target_modules does not select it."""
        excluded = self.exclude_modules or ()
        if re.fullmatch(excluded, path) if isinstance(excluded, str) else _ends_with(path, excluded):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save or ())

    def targets(self, path: str) -> bool:
        """Return whether target_modules selects the module at this path. target_modules must not be `all-linear`.

        A string is a regular expression that must match the whole path. A list holds whole paths or ends of paths.
        If layers_to_transform is set, an end of a path selects only modules in the blocks whose numbers it lists.
        """
        wanted = () if self.excludes(path) else self.target_modules or ()
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return path in wanted or (_ends_with(path, wanted) and self._transforms(path))

    def _transforms(self, path: str) -> bool:
        """Return whether layers_to_transform contains the number of this module's block. If it is not set, return True."""
        blocks = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not blocks:
            return True
        names = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        names = [name for name in names or () if name]
        patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next(filter(None, (re.match(pattern, path) for pattern in patterns)), None)
        number = found and found["idx"]  # None if the half of `a|b` that matched has no group `idx`
        return number is not None and int(number) in blocks


@dataclass(frozen=True)
class LayerUpdate:
    """The low-rank update of one parameter of the base, and the keys of its tensors in the adapter file."""

    path: str
    """Path of the module in the base."""
    parameter: str
    """Name of the parameter in this module: `weight`, or the name of a stack of experts."""
    kind: str
    """`stack` if target_parameters selects the parameter. `expert` if the update is for a layer of one expert, as in
    files that are older than transformers' stacked experts. Otherwise the kind of the module, one of `KINDS`."""
    rank: int
    scaling: float
    A: str
    """Key of A: (R, D); for an embedding (R, entries); for a stack (K R, D), where the R rows of an expert are adjacent;
    for a convolution (R, D, kernel), e.g. (R, D, height, width)."""
    B: str
    """Key of B: (E, R); for a stack (E, R K), with the K columns of a rank adjacent; for a convolution (E, R, 1, ...)."""
    bias: str = ""
    """Key of c (E,), the bias of B. Empty if there is none."""
    magnitude: str = ""
    """Key of DoRA's magnitudes m: (E,), for a convolution (1, E, 1, ...). Empty if there are none."""
    expert: int = 0
    """Index of the expert, for the kind `expert`."""
    half: int | None = None
    """Outputs of the expert's stacked matrix that are updated: 0 for the first half, 1 for the second, None for all."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the file that belong to this update."""
        return tuple(filter(None, (self.A, self.B, self.bias, self.magnitude)))

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Map the keys of this update to the shapes that their tensors must have. module: the base's module at `path`."""
        shape = tuple(self._part(getattr(module, self.parameter)).shape)
        if self.kind in CONVOLUTIONS:
            (E, *inputs), ones = shape, [1] * (len(shape) - 2)
            wanted = ((self.rank, *inputs), (E, self.rank, *ones), (E,), (1, E, *ones))
            return {
                key: one for key, one in zip((self.A, self.B, self.bias, self.magnitude), wanted, strict=True) if key
            }
        stack = shape[0] if self.kind == "stack" and len(shape) == 3 else 1
        E, D = shape[-2:] if not self._is_transposed(module) else reversed(shape[-2:])
        R = self.rank * stack
        found = {self.A: (R, D), self.B: (E, R), self.bias: (E,), self.magnitude: (E,)}
        return {key: shape for key, shape in found.items() if key}

    def weight(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter with the update, in the dtype and the shape of the base's parameter.

        module: the base's module at `path`. tensors: the tensors of the file, by key. For the kind `expert`, change and
        return the base's own parameter, because a copy of the whole stack for each expert would take too long. For all
        other kinds, the result is a copy.
        """
        whole: Tensor = getattr(module, self.parameter).detach()
        whole = whole if self.kind == "expert" else whole.clone()
        W = self._part(whole)
        A_RD, B_ER = (tensors[key].to(W.dtype) for key in (self.A, self.B))
        transposed = self._is_transposed(module)
        W_ED = W.transpose(-2, -1) if transposed else W
        if self.kind in CONVOLUTIONS:  # as a matrix, with one column per input channel and place in the kernel
            W_ED, A_RD, B_ER = W.flatten(1), A_RD.flatten(1), B_ER.flatten(1)
        V_ED = W_ED + self.scaling * (_stacked_update(A_RD, B_ER, len(W)) if W_ED.dim() == 3 else B_ER @ A_RD)
        if self.magnitude:
            V_ED = gain(tensors[self.magnitude].to(W.dtype).flatten(), norms(V_ED))[:, None] * V_ED
        W.copy_(V_ED.transpose(-2, -1) if transposed else V_ED.reshape(W.shape))
        return whole

    def added_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return s c (E,), to be added to the bias of the base. Return None if the file has no bias for this layer."""
        return self.scaling * tensors[self.bias] if self.bias else None

    def _part(self, parameter: Tensor) -> Tensor:
        """Return a view of the part of `parameter` that is updated: the matrix of one expert, half of it, or all."""
        if self.kind != "expert":
            return parameter
        matrix = parameter[self.expert]
        return matrix if self.half is None else matrix.chunk(2)[self.half]

    def _is_transposed(self, module: nn.Module) -> bool:
        """Return whether the base stores the parameter as (D, E)."""
        return self.kind in ("Conv1D", "embedding") or bool(getattr(module, "is_transposed", False))


def _stacked_update(A: Tensor, B: Tensor, experts: int) -> Tensor:
    """Return B A of each expert, (K, E, D). A is (K R, D), ordered by expert; B is (E, R K), ordered by rank."""
    A_KRD, B_ERK = A.reshape(experts, -1, A.shape[-1]), B.reshape(len(B), -1, experts)
    return torch.einsum("erk,krd->ked", B_ERK, A_KRD)


@dataclass(frozen=True)
class AdapterReading:
    """Use of each tensor of an adapter file for one base model: it updates a layer, replaces a parameter, or has no use."""

    updates: tuple[LayerUpdate, ...]
    replaced: dict[str, str]
    """Key of the file -> name of the base's parameter that the tensor replaces."""
    unused: dict[str, str]
    """Key of the file that has no use for this base -> reason."""
    absent: tuple[str, ...]
    """Modules and parameters of the base that the config targets, but for which the file lacks A or B."""
    not_implemented: dict[str, str]
    """Key of the file -> class of the module that it targets. The reference does not implement this class."""


def read(settings: AdapterSettings, keys: Sequence[str], model: nn.Module) -> AdapterReading:
    """Return the use of each tensor of an adapter file for a base model.

    keys: the keys of the file. model: the base. The parameters of `model` may be on the device `meta`.
    """
    updates, absent, there = [], [], set(keys)
    modules = dict(model.named_modules())
    for update in (*_possible(settings, there, model), *_of_experts(settings, keys, modules)):
        if update.A in there and update.B in there:
            updates.append(update)
        else:
            absent.append(update.path if update.kind != "stack" else f"{update.path}.{update.parameter}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    used = {key for update in updates for key in update.keys}
    left = [key for key in keys if key not in used]
    odd = {path: type(modules[path]).__name__ for path in targeted(settings, model) if not _kind(modules[path])}
    owners = {key: path for key in left if (path := _path(key)) in odd and ".lora_" in key}
    left = [key for key in left if key not in owners]
    names = {key: key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in left if key.startswith(PREFIX)}
    replaced = {key: name for key, name in names.items() if name in parameters}
    unused = {key: _why_unused(key, modules) for key in left if key not in replaced}
    return AdapterReading(
        tuple(updates), replaced, unused, tuple(absent), {key: odd[path] for key, path in owners.items()}
    )


@torch.no_grad()
def apply(model: nn.Module, settings: AdapterSettings, tensors: Mapping[str, Tensor]) -> AdapterReading:
    """Write the weights that an adapter file gives into `model`. Return the use of each tensor of the file.

    The weights are computed in the dtype of the model. If two layers are tied, an update of one unties them: an adapter
    of the embedding does not change the tied head. A module that modules_to_save replaces is untied too. Any other base
    weight in the file replaces the weight of both layers. Raises ValueError if a tensor has a wrong shape.
    """
    reading = read(settings, list(tensors), model)
    saved = tuple(f"{path}." for path in _saved(settings, model))
    for key, name in reading.replaced.items():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        _require_shape(key, tensors[key], tuple(getattr(module, own).shape))
        value = tensors[key].to(getattr(module, own).dtype)
        if name.startswith(saved):
            setattr(module, own, nn.Parameter(value.clone(), requires_grad=False))
        else:
            getattr(module, own).copy_(value)
    for update in reading.updates:
        layer: Any = model.get_submodule(update.path)
        for key, shape in update.shapes(layer).items():
            _require_shape(key, tensors[key], shape)
        setattr(layer, update.parameter, nn.Parameter(update.weight(layer, tensors), requires_grad=False))
        added = update.added_bias(tensors)
        if added is not None:
            added = added.to(layer.weight.dtype) + (0.0 if layer.bias is None else layer.bias)
            layer.bias = nn.Parameter(added, requires_grad=False)
    return reading


WeightedAdapter = tuple[AdapterSettings, Mapping[str, Tensor], float]
"""Settings and tensors of an adapter file, and the weight w_i of this adapter in a sum of adapters."""


@torch.no_grad()
def combine(model: nn.Module, adapters: Sequence[WeightedAdapter]) -> None:
    """Write the weights of a weighted sum of adapters into `model`.

        P' = P + sum_i w_i (P_i - P)

    P is a parameter of the base, and P_i is the same parameter after `apply` with adapter i alone. P is 0 where the base
    has no bias. The sum is rounded once, to the dtype of the model. Raises ValueError if a tensor has a wrong shape.
    """
    base = {name: p.detach().double() for name, p in model.named_parameters(remove_duplicate=False)}
    sums: dict[str, Tensor] = {}
    for settings, tensors, weight in adapters:
        changed = copy.deepcopy(model)
        apply(changed, settings, tensors)
        for name, parameter in changed.named_parameters(remove_duplicate=False):
            P = base.get(name, torch.zeros_like(parameter, dtype=torch.float64))
            sums[name] = sums.get(name, P) + weight * (parameter.double() - P)
    dtype = next(model.parameters()).dtype
    for name, value in sums.items():
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, nn.Parameter(value.to(dtype), requires_grad=False))


def targeted(settings: AdapterSettings, model: nn.Module) -> list[str]:
    """Return the paths of the modules of the base that target_modules selects, in the model's order."""
    if isinstance(settings.target_modules, str) and settings.target_modules.lower() == ALL_LINEAR:
        return [path for path in WORDS[ALL_LINEAR](model) if not settings.excludes(path)]
    return [path for path, _ in model.named_modules() if path and settings.targets(path)]


def _possible(settings: AdapterSettings, keys: Collection[str], model: nn.Module) -> Iterator[LayerUpdate]:
    """Yield an update for each target of the config, even if `keys`, the keys of the file, lack the target's tensors."""
    for path in targeted(settings, model):
        kind, start = _kind(model.get_submodule(path)), f"{PREFIX}{path}"
        if kind not in KINDS:
            continue
        names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        A, B = (f"{start}.{name}" for name in names)
        bias = f"{start}.lora_B.bias" if settings.lora_bias else ""
        magnitudes = [f"{start}.lora_magnitude_vector", f"{start}.lora_magnitude_vector.weight"]
        magnitude = next((key for key in magnitudes if key in keys), magnitudes[0]) if settings.use_dora else ""
        yield LayerUpdate(path, "weight", kind, settings.rank(path), settings.scaling(path), A, B, bias, magnitude)
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        stacks = [name for name in own if _ends_with(f"{path}.{name}", settings.target_parameters or ())]
        for index, name in enumerate(stacks):
            # Each parameter of a module has a wrapper, and the wrapper of the first parameter is the innermost one.
            start = f"{PREFIX}{path}" + ".base_layer" * (len(stacks) - 1 - index)
            whole = f"{path}.{name}"
            rank, scaling = settings.rank(whole), settings.scaling(whole)
            yield LayerUpdate(path, name, "stack", rank, scaling, f"{start}.lora_A.weight", f"{start}.lora_B.weight")


def _of_experts(
    settings: AdapterSettings, keys: Sequence[str], modules: Mapping[str, nn.Module]
) -> Iterator[LayerUpdate]:
    """Yield an update for each layer of a single expert, such as `experts.3.w1`, that the file has and the config targets.

    If the base does not stack its experts, yield none. The config's patterns refer to the layer's name in the file.
    modules: the modules of the base, by path.
    """
    for key in keys:
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        found = _EXPERT.fullmatch(path)
        if found is None or path in modules or found["name"] not in _STACKED or not settings.targets(path):
            continue
        stack, (parameter, half) = f"{found['block']}.mlp.experts", _STACKED[found["name"]]
        weight = getattr(modules.get(stack), parameter, None)
        if weight is not None and weight.dim() == 3 and int(found["expert"]) < len(weight):
            A, B = (f"{PREFIX}{path}.lora_{name}.weight" for name in "AB")
            rank, scaling, expert = settings.rank(path), settings.scaling(path), int(found["expert"])
            yield LayerUpdate(stack, parameter, "expert", rank, scaling, A, B, expert=expert, half=half)


def _saved(settings: AdapterSettings, model: nn.Module) -> list[str]:
    """Return the paths of the modules that the file replaces. A name matches any end of a path: `head` takes `lm_head`."""
    names = settings.replaced_modules
    return [path for path, _ in model.named_modules() if path.endswith(names)] if names else []


def _kind(module: nn.Module) -> str:
    """Return the kind of a layer that target_modules may select, one of `KINDS`. For any other module, return "".

    target_modules selects neither convolutions with groups nor stacked experts. target_parameters selects experts.
    """
    return "" if getattr(module, "groups", 1) != 1 or (kind := kind_of(module)) == "experts" else kind


def _path(key: str) -> str:
    """Return the path of the base's module to which a key belongs: "base_model.model.a.b.lora_A.weight" -> "a.b"."""
    return key.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "")


def _why_unused(key: str, modules: Collection[str]) -> str:
    if not key.startswith(PREFIX):
        return f"it does not begin with {PREFIX}"
    if ".lora_" not in key:
        return "the base has no parameter of this name"
    if _path(key) not in modules:
        return f"the base has no module {_path(key)}"
    return f"the config does not target {_path(key)}, or the tensor has no partner"


def _require_shape(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, expected {shape}")


def _matching(patterns: Mapping[str, Any], name: str) -> str:
    """Return the first pattern that matches `name`, or the end of `name` after a dot. If none matches, return `name`."""
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", name)), name)


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
