"""`bitsandbytes-triton`: bitsandbytes' Triton kernels (for XPU and others), run by Triton's interpreter.

The interpreter must be on before Triton is imported: `TRITON_INTERPRET=1 peft-harness check bitsandbytes-triton`. The
module bitsandbytes.backends.triton.ops requires an accelerator. So each function here allocates tensors and calls
kernels in the same way as that module.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import Implementation, implementations_in, implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor
_OPERATION: dict[str, Any] = {
    "name": "bitsandbytes-triton", "kind": "operation", "dtypes": ("float32", "float16"), "devices": ("cpu",),
    "requires": ["triton", "bitsandbytes"],
}  # fmt: skip
MAX_BLOCKS = 64
"""Largest number of quantisation blocks in a case. Triton's interpreter takes some milliseconds for each program
of a kernel."""


def _require_interpreter(blocks: int, values: Tensor | None = None) -> None:
    """Raise Unsupported if Triton's interpreter is off, if there are too many blocks, or if `values` contain NaN."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise Unsupported("set TRITON_INTERPRET=1: on a CPU, Triton's kernels run only in its interpreter")
    if blocks > MAX_BLOCKS:
        raise Unsupported(f"{blocks} blocks would take the interpreter too long")
    if values is not None and values.isnan().any():
        raise Unsupported("the interpreter's maximum treats NaN differently than a GPU does")


def _quantize(form: str) -> Implementation:
    @implements(f"{form}_quantize", **_OPERATION)
    def quantize(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
        import torch

        _require_interpreter(-(-W.numel() // block), W)
        from bitsandbytes.backends.triton import kernels_4bit

        A = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % block))
        pairs = -(A.numel() // -(2 * block))
        absmax, packed = A.new_empty(2 * pairs), torch.empty(A.numel() // 2, 1, dtype=torch.uint8)
        kernels_4bit.quantize_4bit_blockwise_triton(
            A, block, form, pairs, absmax, num_elements=A.numel(), quantized_out=packed
        )
        # The kernel pads to pairs of whole blocks; the padding is cut off.
        return packed.flatten()[: -(-W.numel() // 2)], absmax.float()[: -(-W.numel() // block)]

    return quantize


def _dequantize(form: str) -> Implementation:
    @implements(f"{form}_dequantize", **_OPERATION)
    def dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        import torch

        _require_interpreter(len(absmax))
        from bitsandbytes.backends.triton import kernels_4bit

        W = torch.empty(shape, dtype=dtype)
        kernels_4bit.dequantize_4bit_impl(packed[:, None], absmax, block, form, dtype, out=W)
        return W

    return dequantize


nf4_quantize, fp4_quantize = _quantize("nf4"), _quantize("fp4")
nf4_dequantize, fp4_dequantize = _dequantize("nf4"), _dequantize("fp4")


@implements("dynamic_quantize", **_OPERATION)
def dynamic_quantize(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise x by the 8-bit kernel with the dynamic map. Return the codes, and the absmax of each block."""
    _require_interpreter(-(-x.numel() // block), x)
    from bitsandbytes.backends.triton import kernels_8bit_quant
    from bitsandbytes.functional import create_dynamic_map

    codes, absmax = kernels_8bit_quant.quantize_blockwise_triton(
        x.contiguous(), create_dynamic_map(signed=signed), block
    )
    return codes.flatten(), absmax.float()


@implements("adamw8bit_step", **_OPERATION)
def adamw8bit_step(
    p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, step: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Take one step of AdamW with the 8-bit kernel. Return the new p, m, m_absmax, v and v_absmax.

    p is the parameter. m and v are the 8-bit codes of its two moments, and each block of codes has one absmax.
    """
    import torch

    _require_interpreter(len(m_absmax))
    from bitsandbytes.backends.triton import kernels_optim
    from bitsandbytes.functional import create_dynamic_map

    # bitsandbytes' operators and optimizer pass contiguous tensors to the kernels, and so does this function.
    state = {"p": p, "state1": m, "absmax1": m_absmax, "state2": v, "absmax2": v_absmax}
    after = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    kernels_optim.optimizer_update_8bit_blockwise_impl(
        optimizer_name="adam", g=g.contiguous(),
        beta1=betas[0], beta2=betas[1], beta3=0.0, alpha=0.0, eps=eps, step=step, lr=lr,
        qmap1=create_dynamic_map(signed=True), qmap2=create_dynamic_map(signed=False), weight_decay=weight_decay,
        gnorm_scale=1.0, skip_zeros=False, **after,
    )  # fmt: skip
    return after["p"], after["state1"], after["absmax1"], after["state2"], after["absmax2"]


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return implementations_in(__name__)
