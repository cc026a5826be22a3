"""bitsandbytes' 4-bit and 8-bit linear layers, on packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.implementations.bitsandbytes.quantisers import state_of
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Tensor


@implements("nf4_linear", name="bitsandbytes", kind="operation", requires=["bitsandbytes"])
def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, int], bias: Tensor | None, training: bool
) -> Any:
    """Return the output of bitsandbytes' Linear4bit for the input x. The layer computes in the dtype of x."""
    import bitsandbytes
    import torch

    E, D = shape
    layer = bitsandbytes.nn.Linear4bit(
        D, E, bias=bias is not None, compute_dtype=x.dtype, compress_statistics=False, quant_type="nf4", device="meta"
    )
    state = state_of(absmax, block, shape, x.dtype, "nf4")
    layer.weight = bitsandbytes.nn.Params4bit(
        packed[:, None], requires_grad=False, quant_state=state, blocksize=block, compress_statistics=False,
        quant_type="nf4", bnb_quantized=True, module=layer,
    )  # fmt: skip
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer.train(training)(x)


@implements("int8_linear", name="bitsandbytes", kind="operation", requires=["bitsandbytes"])
def int8_linear(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, training: bool) -> Any:
    """Return the output of bitsandbytes' Linear8bitLt for the input x."""
    import bitsandbytes
    import torch

    E, D = codes.shape
    layer = bitsandbytes.nn.Linear8bitLt(
        D, E, bias=bias is not None, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    layer.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer.train(training)(x)
