"""Find, replace and densify the linear layers of a model: the surgery every layer-wise method needs. Not a Method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def targets(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Map path to linear layer for every layer whose path is, or ends in, one of `names`, in the model's order.

    A linear layer is nn.Linear or a quantised subclass of it. Raises ValueError for a name that fits no layer.
    """
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {path: m for path, m in linear.items() if any(path == n or path.endswith(f".{n}") for n in names)}
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in found):
            ends = sorted({path.rsplit(".", 1)[-1] for path in linear})
            raise ValueError(f"no linear layer is named {name!r}; this model has: {', '.join(ends)}")
    return found


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def floating_dtype(base: nn.Module) -> torch.dtype:
    """Return the dtype an adapter of `base` trains in: that of its weight, or if that is packed, of its products."""
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return getattr(base, "compute_dtype", None) or torch.float32  # bitsandbytes' name for it


def dense_weight(base: nn.Linear) -> torch.Tensor:
    """Return the matrix (out, in) that `base` multiplies by, whatever form it keeps it in.

    A packed layer is asked for its columns: it is linear, so its images of the unit vectors are its matrix, exactly,
    since each product is 1 w + 0 + 0 ...
    """
    if type(base) is nn.Linear:
        return base.weight.detach().clone()
    unit = torch.eye(base.in_features, dtype=floating_dtype(base), device=next(base.parameters()).device)
    was_training, bias = base.training, base.bias
    base.bias = None  # type: ignore[assignment]  # (w + b) - b would round
    try:
        with torch.no_grad():
            # Some packed layers compute in another precision in eval mode; training mode is what the adapter trained on.
            columns: torch.Tensor = base.train()(unit)
    finally:
        base.bias = bias
        base.train(was_training)
    return columns.T.contiguous()


def dense_copy(base: nn.Linear) -> nn.Linear:
    """Return an nn.Linear that computes what `base` computes, in its floating dtype."""
    weight = dense_weight(base)
    dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return dense.train(base.training)
