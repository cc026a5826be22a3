"""`bitsandbytes` as a quantisation of the base weights."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.methods.registry import implements

DTYPES = ("float32", "bfloat16", "float16")


@implements("nf4", name="bitsandbytes", kind="base", dtypes=DTYPES, requires=["bitsandbytes"])
def nf4(model: Any, paths: list[str], dtype: Any) -> dict[str, tuple[Any, Any, int]]:
    """Replace the linear layers at `paths` by bitsandbytes' NF4 layers, in place; return path -> (bytes, absmax, block).

    Blocks of 64, no double quantisation; matrix products in `dtype`, biases kept in it. Raises Unsupported for any other
    layer.
    """
    return _pack(model, paths, dtype, double=False)


@implements("nf4-dq", name="bitsandbytes", kind="base", dtypes=DTYPES, requires=["bitsandbytes"])
def nf4_dq(model: Any, paths: list[str], dtype: Any) -> dict[str, tuple[Any, Any, int, bool]]:
    """Do as `nf4` with double quantisation, the default. The absmax returned is what it decodes to; True says so."""
    return {path: (*form, True) for path, form in _pack(model, paths, dtype, double=True).items()}


def _pack(model: Any, paths: list[str], dtype: Any, double: bool) -> dict[str, tuple[Any, Any, int]]:
    import bitsandbytes
    import torch

    from reference.shared.layers import replace

    forms = {}
    layers = {path: model.get_submodule(path) for path in paths}
    for path, dense in layers.items():
        if not isinstance(dense, torch.nn.Linear):
            raise Unsupported(f"{path} is a {type(dense).__name__}; bitsandbytes packs linear layers")
    for path, dense in layers.items():
        device = dense.weight.device
        packed = bitsandbytes.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            compute_dtype=dtype,
            compress_statistics=double,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            dense.weight.detach().contiguous(),
            requires_grad=False,
            compress_statistics=double,
            quant_type="nf4",
            module=packed,
        ).to(device)
        if dense.bias is not None:
            packed.bias = torch.nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        # On CPUs with AVX512-BF16 its eval mode repacks the weight for good and computes in bfloat16 whatever compute_dtype
        # says; a later backward pass then has no gradient for the layer's input. Operation nf4_linear shows it.
        packed.support_avx512bf16_for_cpu = False
        replace(model, path, packed.train(dense.training))
        state = packed.weight.quant_state
        forms[path] = (packed.weight.data.flatten(), _absmax(state), int(state.blocksize))
    return forms


def _absmax(state: Any) -> Any:
    """Return the absmax that a quantisation state means, decoded as `dequantize_4bit` does if it is in two levels."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax
    return dequantize_blockwise(state.absmax, state.state2) + state.offset
