"""NF4: quantisers, double quantisation, layers and packed bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_HOW: dict[str, Any] = {"name": "fused", "kind": "operation", "dtypes": _DTYPES}


@implements("nf4_quantize", **_HOW)
def nf4_quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise, for any length and any block."""
    from harness.kernels.torch.nf4 import quantize

    return quantize(W, block)


@implements("nf4_dequantize", **_HOW)
def nf4_dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Decode into new memory."""
    from harness.kernels.torch.nf4 import dequantize

    return dequantize(packed, absmax, block, shape, dtype)


@implements("double_quantize", **_HOW)
def double_quantize(absmax: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean and quantise the rest in blocks."""
    from harness.kernels.torch.nf4 import double_quantize

    return double_quantize(absmax, block)


@implements("double_dequantize", **_HOW)
def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> Tensor:
    """Decode the codes and add the mean."""
    from harness.kernels.torch.nf4 import double_dequantize

    return double_dequantize(codes, absmax2, offset, block)


@implements("nf4_linear", **_HOW)
def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, int], bias: Tensor | None, training: bool
) -> Tensor:
    """Decode into reused memory and multiply."""
    from harness.kernels.torch.nf4_linear import nf4_linear

    return nf4_linear(x, packed, absmax, block, shape, bias, training)


@implements("nf4_lora_linear", **_HOW)
def nf4_lora_linear(**arguments: Any) -> Any:
    """Decode into reused memory, multiply, and add the low-rank term in place."""
    from harness.kernels.torch.nf4_lora_linear import nf4_lora_linear

    return nf4_lora_linear(**arguments)


@implements("nf4", name="fused", kind="base", dtypes=_DTYPES)
def nf4(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Replace the linear layers at `paths` by packed ones, in place; return path -> (bytes, absmax, block).

    Blocks of 64, no double quantisation; matrix products and biases in `dtype`. Raises Unsupported for other layers.
    """
    return _pack(model, paths, dtype, double=False)


@implements("nf4-dq", name="fused", kind="base", dtypes=_DTYPES)
def nf4_dq(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, int, bool]]:
    """Quantise as `nf4`, with double quantisation; return path -> (bytes, decoded absmax, block, True)."""
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
