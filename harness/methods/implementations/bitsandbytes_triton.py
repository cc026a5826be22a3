"""`bitsandbytes-triton`: the Triton kernels that bitsandbytes runs on XPU and others, here by Triton's interpreter.

The interpreter must be on before Triton is imported: `TRITON_INTERPRET=1 peft-harness check bitsandbytes-triton`. Each
function allocates and calls as bitsandbytes.backends.triton.ops does, which itself wants an accelerator.
"""

from __future__ import annotations

import os
from typing import Any

from harness.errors import Unsupported
from harness.methods.registry import Implementation, implements

_HOW: dict[str, Any] = {
    "name": "bitsandbytes-triton", "kind": "operation", "dtypes": ("float32", "float16"), "devices": ("cpu",),
    "requires": ["triton", "bitsandbytes"],
}  # fmt: skip
# The interpreter runs a program at a time, some milliseconds each.
MOST_BLOCKS = 64


def _interpreted(blocks: int, values: Any = None) -> None:
    """Raise Unsupported where the kernels cannot run, would take too long, or `values` would prove nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise Unsupported("set TRITON_INTERPRET=1: on the CPU Triton's kernels run in its interpreter only")
    if blocks > MOST_BLOCKS:
        raise Unsupported(f"{blocks} blocks would take the interpreter too long")
    if values is not None and values.isnan().any():
        raise Unsupported("what a maximum makes of NaN is the interpreter's business, and not that of a device")


def _quantize(form: str) -> Implementation:
    @implements(f"{form}_quantize", **_HOW)
    def quantize(W: Any, block: int) -> tuple[Any, Any]:
        import torch

        _interpreted(-(-W.numel() // block), W)
        from bitsandbytes.backends.triton import kernels_4bit

        A = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % block))
        pairs = -(A.numel() // -(2 * block))
        absmax, packed = A.new_empty(2 * pairs), torch.empty(A.numel() // 2, 1, dtype=torch.uint8)
        kernels_4bit.quantize_4bit_blockwise_triton(
            A, block, form, pairs, absmax, num_elements=A.numel(), quantized_out=packed
        )
        # It fills up the last block, and pairs of blocks; what is asked for is what the tensor needs.
        return packed.flatten()[: -(-W.numel() // 2)], absmax.float()[: -(-W.numel() // block)]

    return quantize


def _dequantize(form: str) -> Implementation:
    @implements(f"{form}_dequantize", **_HOW)
    def dequantize(packed: Any, absmax: Any, block: int, shape: tuple[int, ...], dtype: Any) -> Any:
        import torch

        _interpreted(len(absmax))
        from bitsandbytes.backends.triton import kernels_4bit

        W = torch.empty(shape, dtype=dtype)
        kernels_4bit.dequantize_4bit_impl(packed[:, None], absmax, block, form, dtype, out=W)
        return W

    return dequantize


nf4_quantize, fp4_quantize = _quantize("nf4"), _quantize("fp4")
nf4_dequantize, fp4_dequantize = _dequantize("nf4"), _dequantize("fp4")


@implements("dynamic_quantize", **_HOW)
def dynamic_quantize(x: Any, block: int, signed: bool) -> tuple[Any, Any]:
    """Quantise by the 8-bit kernel with the dynamic map."""
    _interpreted(-(-x.numel() // block), x)
    from bitsandbytes.backends.triton import kernels_8bit_quant
    from bitsandbytes.functional import create_dynamic_map

    codes, absmax = kernels_8bit_quant.quantize_blockwise_triton(
        x.contiguous(), create_dynamic_map(signed=signed), block
    )
    return codes, absmax.float()


@implements("adamw8bit_step", **_HOW)
def adamw8bit_step(
    p: Any, g: Any, m: Any, m_absmax: Any, v: Any, v_absmax: Any, step: int, lr: float, betas: Any, eps: float,
    weight_decay: float,
) -> tuple[Any, ...]:  # fmt: skip
    """Take one step by the fused kernel."""
    import torch

    _interpreted(len(m_absmax))
    from bitsandbytes.backends.triton import kernels_optim
    from bitsandbytes.functional import create_dynamic_map

    # Its operators and its optimizer make contiguous what they hand to the kernels, and so does this.
    given = {"p": p, "state1": m, "absmax1": m_absmax, "state2": v, "absmax2": v_absmax}
    after = {name: t.clone(memory_format=torch.contiguous_format) for name, t in given.items()}
    kernels_optim.optimizer_update_8bit_blockwise_impl(
        optimizer_name="adam", g=g.contiguous(),
        beta1=betas[0], beta2=betas[1], beta3=0.0, alpha=0.0, eps=eps, step=step, lr=lr,
        qmap1=create_dynamic_map(signed=True), qmap2=create_dynamic_map(signed=False), weight_decay=weight_decay,
        gnorm_scale=1.0, skip_zeros=False, **after,
    )  # fmt: skip
    return after["p"], after["state1"], after["absmax1"], after["state2"], after["absmax2"]


def implementations() -> list[Implementation]:
    """Return all that this file offers."""
    return [one for one in globals().values() if isinstance(one, Implementation)]
