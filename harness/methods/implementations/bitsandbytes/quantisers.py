"""bitsandbytes' blockwise quantisers, called through `bitsandbytes.functional`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.registry import Implementation, implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor
_OPERATION: dict[str, Any] = {"name": "bitsandbytes", "kind": "operation", "requires": ["bitsandbytes"]}


def _quantize(form: str) -> Implementation:
    @implements(f"{form}_quantize", **_OPERATION)
    def quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(W, blocksize=block, quant_type=form)
        return packed.flatten(), state.absmax

    return quantize


def _dequantize(form: str) -> Implementation:
    @implements(f"{form}_dequantize", **_OPERATION)
    def dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(packed[:, None], state_of(absmax, block, shape, dtype, form))
        return weight

    return dequantize


nf4_quantize, fp4_quantize = _quantize("nf4"), _quantize("fp4")
nf4_dequantize, fp4_dequantize = _dequantize("nf4"), _dequantize("fp4")


def state_of(absmax: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype, form: str) -> Any:
    """Return bitsandbytes' QuantState of a packed 4-bit weight. form: `nf4` or `fp4`."""
    import torch
    from bitsandbytes.functional import QuantState, get_4bit_type

    code = get_4bit_type(form, device=absmax.device)
    size = torch.Size(shape)
    return QuantState(absmax=absmax, shape=size, code=code, blocksize=block, quant_type=form, dtype=dtype)


@implements("double_quantize", **_OPERATION)
def double_quantize(absmax: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean of `absmax`, and quantise the differences in blocks.

    Return the codes, the absmax of each block of codes, and the mean. bitsandbytes' `quantize_4bit`
    does the same if compress_statistics is True.
    """
    from bitsandbytes.functional import quantize_blockwise

    offset = absmax.mean()
    codes, state = quantize_blockwise(absmax - offset, blocksize=block)
    return codes, state.absmax, offset


@implements("double_dequantize", **_OPERATION)
def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> Tensor:
    """Decode the codes, add `offset`, and return the sum. `dequantize_4bit` decodes a nested absmax in this way."""
    from bitsandbytes.functional import dequantize_blockwise

    constants: Tensor = dequantize_blockwise(codes, absmax=absmax2, blocksize=block) + offset
    return constants


@implements("dynamic_quantize", **_OPERATION)
def dynamic_quantize(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise x by `quantize_blockwise` and the dynamic map. Return the 8-bit codes, and the absmax of each block."""
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    codes, state = quantize_blockwise(x, code=create_dynamic_map(signed=signed).to(x.device), blocksize=block)
    return codes.flatten(), state.absmax
