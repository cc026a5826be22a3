"""Quantisation of a model's base weights by `fused`: NF4, with and without double quantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@implements("nf4", name="fused", kind="base", dtypes=DTYPES)
def nf4(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Replace the linear layers at `paths` by packed layers, in place.

    Return, for each path, the packed bytes, the absmax of each block, and the block size. A block has 64 weights. There
    is no double quantisation. Matrix products and biases are in `dtype`. Raises Unsupported if a layer is not linear.
    """
    return _pack(model, paths, dtype, double=False)


@implements("nf4-dq", name="fused", kind="base", dtypes=DTYPES)
def nf4_dq(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, int, bool]]:
    """Replace layers as `nf4` does, but with double quantisation.

    Return, for each path, the packed bytes, the decoded absmax of each block, the block size, and True, which marks
    double quantisation.
    """
    return {path: (*form, True) for path, form in _pack(model, paths, dtype, double=True).items()}


def _pack(
    model: nn.Module, paths: list[str], dtype: torch.dtype, double: bool
) -> dict[str, tuple[Tensor, Tensor, int]]:
    from torch import nn

    from harness.kernels.torch.nf4_linear import Nf4Linear
    from reference.shared.layers import replace

    layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    for path, dense in layers.items():
        if type(dense) is not nn.Linear:
            raise Unsupported(f"{path} is a {type(dense).__name__}; only linear layers can be packed")
    forms = {}
    for path, dense in layers.items():
        packed = Nf4Linear(dense, dtype, double=double)
        replace(model, path, packed)
        forms[path] = (packed.weight.data, packed.packed_weight.constants(), packed.block)
    return forms
