"""Quantisation of a model's base weights by bitsandbytes: NF4, with and without double quantisation, and 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@implements("nf4", name="bitsandbytes", kind="base", requires=["bitsandbytes"])
def nf4(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Replace the linear layers at `paths` by bitsandbytes' NF4 layers, in place.

    Return, for each path, the packed bytes, the absmax of each block, and the block size. A block has 64 weights. There
    is no double quantisation. Matrix products and biases are in `dtype`. Raises Unsupported if a layer is not linear.
    """
    return _pack(model, paths, dtype, double=False)


@implements("nf4-dq", name="bitsandbytes", kind="base", requires=["bitsandbytes"])
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

    from reference.shared.layers import replace

    forms = {}
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    for path, dense in layers.items():
        if not isinstance(dense, nn.Linear):
            raise Unsupported(f"{path} is a {type(dense).__name__}; bitsandbytes packs linear layers")
    for path, dense in layers.items():
        packed = packed_layer(dense, dtype, double)
        replace(model, path, packed)
        state = packed.weight.quant_state
        forms[path] = (packed.weight.data.flatten(), _absmax(state), int(state.blocksize))
    return forms


def packed_layer(dense: nn.Linear, compute_dtype: torch.dtype, double: bool, block: int | None = None) -> Any:
    """Return a Linear4bit with the weight of `dense` in NF4.

    double: True to quantise the absmax of the blocks, too. block: number of weights per block. None means bitsandbytes'
    default, 64.
    """
    import bitsandbytes
    import torch

    weight = dense.weight.detach()
    options = {"compress_statistics": double, "quant_type": "nf4"}
    packed: Any = bitsandbytes.nn.Linear4bit(
        dense.in_features, dense.out_features, dense.bias is not None, compute_dtype, device="meta", **options
    )
    packed.weight = bitsandbytes.nn.Params4bit(
        weight.contiguous(), requires_grad=False, blocksize=block, module=packed, **options
    ).to(weight.device)
    if dense.bias is not None:
        packed.bias = torch.nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    # On CPUs with AVX512-BF16, eval mode repacks the weight permanently and computes in bfloat16, whatever compute_dtype is.
    # A later backward pass then has no gradient for the layer's input. The Operation nf4_linear shows this.
    packed.support_avx512bf16_for_cpu = False
    return packed.train(dense.training)


def eight_bit_layer(dense: nn.Linear, threshold: float) -> Any:
    """Return a Linear8bitLt with the weight of `dense` in 8 bits. threshold: magnitude of outliers in the input; 0: none."""
    import bitsandbytes
    import torch

    weight = dense.weight.detach()
    packed: Any = bitsandbytes.nn.Linear8bitLt(
        dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False, threshold=threshold,
        device="meta",
    )  # fmt: skip
    packed.weight = bitsandbytes.nn.Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False).to(
        weight.device
    )
    if dense.bias is not None:
        packed.bias = torch.nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    return packed.train(dense.training)


def _absmax(state: Any) -> Tensor:
    """Return the absmax of a QuantState. If the state is nested, decode the absmax as `dequantize_4bit` does."""
    from bitsandbytes.functional import dequantize_blockwise

    absmax: Tensor = state.absmax
    return dequantize_blockwise(absmax, state.state2) + state.offset if state.nested else absmax
