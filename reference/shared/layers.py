"""Find layers of a model, replace them, and make dense copies of them. Not a Method."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn

LINEAR = ("linear",)
LINEAR_OR_CONV1D = ("linear", "Conv1D")
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: Mapping[str, type[Convolution]] = {"nn.Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
"""Kind of a convolution -> class of the layer. The kind of nn.Conv1d names its module, since Conv1D is a linear layer."""
KINDS = ("linear", "Conv1D", "embedding", *CONVOLUTIONS, "experts")
"""Kinds of layers that a Method may adapt. Every Method adapts the first kind, `linear`."""


def kind_of(module: nn.Module) -> str:
    """Return the kind of a layer, one of `KINDS`. For any other module, return "".

    linear: nn.Linear or a quantised subclass. Conv1D: transformers' linear layer with the weight stored as (in, out).
    embedding, nn.Conv1d, Conv2d, Conv3d: the classes of torch.nn, and subclasses with the same forward pass; an
    embedding may also multiply by its `embed_scale`. experts: a module that stacks experts. Other subclasses are excluded:
    they transform their weight, e.g. by a norm, and would have to transform the update of a Method too.
    """
    layer: Any = module
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "weight"):
        return "Conv1D" if layer.weight.shape == (getattr(module, "nx", -1), getattr(module, "nf", -1)) else ""
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if plain else ""
    for kind, plain_class in CONVOLUTIONS.items():
        if isinstance(module, plain_class):
            convolves = (type(module).forward, type(module)._conv_forward)
            return kind if convolves == (plain_class.forward, plain_class._conv_forward) else ""
    return "experts" if stacked_weights(module) else ""


def stacked_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Map names to the parameters (experts, ..., ...) that stack the matrices of all experts of a block.

    A module of experts has a class named `...Experts`, as in transformers. For any other module the result is empty.
    """
    if not type(module).__name__.endswith("Experts"):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


@overload
def targets(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]: ...
@overload
def targets(model: nn.Module, names: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]: ...
def targets(model: nn.Module, names: Sequence[str], kinds: Sequence[str] = LINEAR) -> dict[str, Any]:
    """Map paths to the layers that `names` select, in the model's order.

    A name is a whole path, the end of a path after a dot, or one of `WORDS`. kinds: the `KINDS` that the Method adapts.
    Raises ValueError if a name matches no layer of these kinds. Also raises it if a name matches a layer of another
    kind, because that layer would not be adapted.
    """
    found: dict[str, Any] = {}
    for name in names:
        if name in WORDS:
            found |= _layers_of_word(model, name, kinds)
            continue
        matching = named(model, [name])
        supported = {path: module for path, module in matching.items() if kind_of(module) in kinds}
        for path, module in matching.items():
            if path not in supported and (kind_of(module) or not supported):
                raise ValueError(f"{path} is a {type(module).__name__}, which this method does not support")
        if not supported:
            known = [path for path, module in model.named_modules() if kind_of(module) in kinds]
            ends = sorted({path.rpartition(".")[-1] for path in known}) or ["none"]
            raise ValueError(f"no {_listed(kinds)} layer is named {name!r}; this model has: {', '.join(ends)}")
        found |= supported
    return {path: found[path] for path, _ in model.named_modules() if path in found}


def named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Map paths to the modules of `model`, of any kind, that `names` select: whole paths, or ends of paths after a dot."""
    ends = tuple(f".{name}" for name in names)
    return {path: module for path, module in model.named_modules() if f".{path}".endswith(ends)}


def _attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers inside the model's attention blocks, e.g. those for q, k, v and the output.

    A block is a module whose class is named `...Attention`, as in transformers.
    """
    blocks = [path for path, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    return {
        path: layer
        for path, layer in _linear_layers(model).items()
        if any(path.startswith(f"{block}.") for block in blocks)
    }


def _all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Return all linear layers of the model's trunk, i.e. without its head and the layer that computes the logits.

    HF peft's `all-linear` selects the same layers, with one exception: of a head with several layers, HF peft leaves out
    only the last one.
    """
    get_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output, trunk = get_output(), getattr(model, "base_model_prefix", "")
    start = f"{trunk}." if trunk and hasattr(model, trunk) else ""
    return {path: m for path, m in _linear_layers(model).items() if m is not output and path.startswith(start)}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if kind_of(module) in LINEAR_OR_CONV1D}


WORDS: Mapping[str, Callable[[nn.Module], dict[str, nn.Module]]] = {"attention": _attention, "all-linear": _all_linear}
"""Word that `targets` accepts instead of a name -> function that returns the layers for this word."""


def _layers_of_word(model: nn.Module, word: str, kinds: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers that `word` selects. Raises ValueError if there are none, or if a layer's kind is not in `kinds`."""
    found = WORDS[word](model)
    for path, module in found.items():
        if kind_of(module) not in kinds:
            kind = type(module).__name__
            raise ValueError(f"{word!r} selects {path} too, a {kind}, which this method does not support")
    if not found:
        kind, where = type(model).__name__, "except its output"
        if word == "attention":
            where = "in a module of a class named ...Attention"
        raise ValueError(f"{word!r} selects no layer of this {kind}: it has no linear layer {where}")
    return found


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the module of `model` at `path`, in the same mode, training or eval."""
    parent, _, name = path.rpartition(".")
    module.train(model.get_submodule(path).training)
    setattr(model.get_submodule(parent), name, module)


def floating_dtype(base: nn.Module) -> torch.dtype:
    """Return the dtype for an adapter of `base`: that of the first floating-point parameter, or else `compute_dtype`, or
    else that of the first floating-point buffer, or else float32.
    """
    for parameter in base.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    computed: torch.dtype | None = getattr(base, "compute_dtype", None)  # an attribute of bitsandbytes' layers
    return computed or next((buffer.dtype for buffer in base.buffers() if buffer.is_floating_point()), torch.float32)


def device_of(base: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer of `base`. A packed layer may have buffers only."""
    return next(itertools.chain(base.parameters(), base.buffers())).device


def features_in_out(base: Any) -> tuple[int, int]:
    """Return D and E, the sizes of a layer's inputs and outputs. The layer is of any kind except `experts`.

    The inputs of a convolution are the numbers that one output reads, so D = (input channels / groups) x (product of the
    kernel's sides).
    """
    match kind_of(base):
        case "Conv1D":
            return base.nx, base.nf
        case "embedding":
            return base.num_embeddings, base.embedding_dim
        case kind if kind in CONVOLUTIONS:
            return math.prod(base.weight.shape[1:]), base.out_channels
    return base.in_features, base.out_features


def as_stored(base: nn.Module, W_ED: torch.Tensor) -> torch.Tensor:
    """Convert a matrix (E, D) to the layout of the weight of `base`, or a matrix in this layout to (E, D). Return a view.

    Conv1D and embedding store (D, E), so both conversions transpose. For any other layer, return the matrix as it is.
    """
    return W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED


def dense_weight(base: Any) -> torch.Tensor:
    """Return the dense matrix (out, in) by which `base` multiplies its inputs.

    A Conv1D stores the transpose of its matrix. An embedding multiplies one-hot rows by its table, so its matrix is the
    transpose of the table. If such a weight trains, the matrix has its graph. The matrix of a packed layer is computed as
    its output for the unit vectors. This is exact, since each product is 1 w + 0 + 0 ...
    """
    if kind_of(base) in ("Conv1D", "embedding"):
        transposed: torch.Tensor = base.weight.T.contiguous()
        return transposed
    if type(base) is nn.Linear:
        return base.weight.clone()
    unit = torch.eye(base.in_features, dtype=floating_dtype(base), device=device_of(base))
    was_training, bias = base.training, base.bias
    base.bias = None  # type: ignore[assignment]  # (w + b) - b would round
    try:
        with torch.no_grad():
            # The adapter trained in training mode. In eval mode, some packed layers compute in another precision.
            columns: torch.Tensor = base.train()(unit)
    finally:
        base.bias = bias
        base.train(was_training)
    return columns.T.contiguous()


@overload
def dense_copy(base: nn.Linear) -> nn.Linear: ...
@overload
def dense_copy(base: nn.Module) -> nn.Module: ...
def dense_copy(base: nn.Module) -> nn.Module:
    """Return an independent frozen layer with the same output as `base`, in the floating dtype of `base`.

    For a linear layer, packed or not, this is an nn.Linear. For any other layer, it is a copy.
    """
    if not isinstance(base, nn.Linear):
        return copy.deepcopy(base).requires_grad_(False)
    weight = dense_weight(base).detach()
    dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return dense.train(base.training)
