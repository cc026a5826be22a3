"""Kinds of layers, the matrix of a linear layer, and merged copies of layers."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Layers = dict[str, nn.Module]
CONVOLUTIONS = {nn.Conv1d: "nn.Conv1d", nn.Conv2d: "Conv2d", nn.Conv3d: "Conv3d"}


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a layer that some Method adapts, or None for any other module."""
    names = [cls.__name__ for cls in type(module).__mro__]
    if names[0].endswith("Experts"):
        return "experts"
    if "Conv1D" in names:
        return "Conv1D"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return next((kind for cls, kind in CONVOLUTIONS.items() if isinstance(module, cls)), None)


def is_dense(base: nn.Module) -> bool:
    """Tell whether a linear layer holds a floating-point matrix, and not packed codes."""
    return base.weight.is_floating_point() and base.weight.shape == (base.out_features, base.in_features)


def layer_dtype(base: nn.Module) -> torch.dtype:
    """Return the dtype in which a layer computes, also if its weight is packed."""
    weight = getattr(base, "weight", None)
    if weight is None or not weight.is_floating_point():
        return base.compute_dtype
    return weight.dtype


def sizes(base: nn.Module) -> tuple[int, int]:
    """Return the outputs and inputs (E, D) of a linear layer or a Conv1D."""
    if kind_of(base) == "Conv1D":
        return base.weight.shape[1], base.weight.shape[0]
    return base.out_features, base.in_features


def matrix(base: nn.Module) -> Tensor:
    """Return the weight (E, D) of a linear layer or a Conv1D. A packed weight is decoded by unit vectors."""
    if kind_of(base) == "Conv1D":
        return base.weight.T
    if is_dense(base):
        return base.weight
    twin = copy.copy(base)
    twin._parameters = {**base._parameters, "bias": None}
    with torch.no_grad():
        return twin(torch.eye(base.in_features, dtype=layer_dtype(base), device=base.weight.device)).T.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for all narrower dtypes."""
    return torch.promote_types(dtype, torch.float32)


def frozen(values: Tensor, like: Tensor | None = None) -> nn.Parameter:
    """Return values as a parameter that does not train, in the dtype of `like`."""
    return nn.Parameter(values.to(values if like is None else like), requires_grad=False)


def with_matrix(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a plain copy of a linear layer or a Conv1D that has another weight (E, D) and another bias."""
    if kind_of(base) == "linear" and not is_dense(base):
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        dense.weight = frozen(weight.to(layer_dtype(base)))
        dense.bias = None if bias is None else frozen(bias)
        return dense.train(base.training)
    return with_weight(base, weight.T if kind_of(base) == "Conv1D" else weight, bias)


def with_weight(base: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Return a copy of a dense layer that has another weight, in the dtype of the old one, and another bias."""
    layer = copy.deepcopy(base)
    layer.weight = frozen(weight.detach().contiguous(), base.weight)
    if bias is not None:
        layer.bias = frozen(bias.detach(), base.weight)
    return layer


def convolve(base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Convolve as `base` does, with its stride, padding, padding mode and dilation, but another kernel and other groups."""
    padding = base.padding
    if base.padding_mode != "zeros":
        x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = 0
    function: Callable[..., Tensor] = getattr(nn.functional, f"conv{weight.dim() - 2}d")
    return function(x, weight, bias, base.stride, padding, base.dilation, groups)


def per_channel(vector: Tensor, weight: Tensor) -> Tensor:
    """Shape a vector (E,) to multiply the outputs of a convolution with this weight; a batch dimension may be missing."""
    return vector.reshape(-1, *[1] * (weight.dim() - 2))
