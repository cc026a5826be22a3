"""NF4: its quantisers, its double quantisation, layers on it, and packed bases."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.methods.registry import implements

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_HOW: dict[str, Any] = {"name": "fused", "kind": "operation", "dtypes": _DTYPES}


@implements("nf4_quantize", **_HOW)
def nf4_quantize(W: Any, block: int) -> tuple[Any, Any]:
    """Quantise; any length and any block."""
    from harness.kernels.torch.nf4 import quantize

    return quantize(W, block)


@implements("nf4_dequantize", **_HOW)
def nf4_dequantize(packed: Any, absmax: Any, block: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Decode into fresh memory."""
    from harness.kernels.torch.nf4 import dequantize

    return dequantize(packed, absmax, block, shape, dtype)


@implements("double_quantize", **_HOW)
def double_quantize(absmax: Any, block: int) -> tuple[Any, Any, Any]:
    """Take the mean off and quantise the rest in blocks."""
    from harness.kernels.torch.nf4 import double_quantize

    return double_quantize(absmax, block)


@implements("double_dequantize", **_HOW)
def double_dequantize(codes: Any, absmax2: Any, offset: Any, block: int) -> Any:
    """Decode the codes and add the mean."""
    from harness.kernels.torch.nf4 import double_dequantize

    return double_dequantize(codes, absmax2, offset, block)


@implements("nf4_linear", **_HOW)
def nf4_linear(x: Any, packed: Any, absmax: Any, block: int, shape: tuple[int, int], bias: Any, training: bool) -> Any:
    """Decode into memory that is used again, and multiply."""
    from harness.kernels.torch.nf4_linear import nf4_linear

    return nf4_linear(x, packed, absmax, block, shape, bias, training)


@implements("nf4_lora_linear", **_HOW)
def nf4_lora_linear(**arguments: Any) -> Any:
    """Do the same, and add the low-rank term into the product."""
    from harness.kernels.torch.nf4_lora_linear import nf4_lora_linear

    return nf4_lora_linear(**arguments)


@implements("nf4", name="fused", kind="base", dtypes=_DTYPES)
def nf4(model: Any, paths: list[str], dtype: Any) -> dict[str, tuple[Any, Any, int]]:
    """Replace the linear layers at `paths` by packed ones, in place; return path -> (bytes, absmax, block).

    Blocks of 64, no double quantisation; matrix products in `dtype`, biases kept in it. Raises Unsupported for any other
    layer.
    """
    return _pack(model, paths, dtype, double=False)


@implements("nf4-dq", name="fused", kind="base", dtypes=_DTYPES)
def nf4_dq(model: Any, paths: list[str], dtype: Any) -> dict[str, tuple[Any, Any, int, bool]]:
    """Do as `nf4` with double quantisation. The absmax returned is what it decodes to; True says so."""
    return {path: (*form, True) for path, form in _pack(model, paths, dtype, double=True).items()}


def _pack(model: Any, paths: list[str], dtype: Any, double: bool) -> dict[str, tuple[Any, Any, int]]:
    from torch import nn

    from harness.kernels.torch.nf4_linear import Nf4Linear
    from reference.shared.layers import replace

    layers = {path: model.get_submodule(path) for path in paths}
    for path, dense in layers.items():
        if type(dense) is not nn.Linear:
            raise Unsupported(f"{path} is a {type(dense).__name__}; linear layers are packed")
    forms = {}
    for path, dense in layers.items():
        packed = Nf4Linear(dense, dtype, double=double)
        replace(model, path, packed)
        forms[path] = (packed.weight.data, packed.packed_weight.constants(), packed.block)
    return forms
