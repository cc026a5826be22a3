"""`torchao`: its NF4 tensor and its 8-bit AdamW."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.registry import Implementation, implements

DTYPES = ("float32", "bfloat16", "float16")
_HOW: dict[str, Any] = {"name": "torchao", "kind": "operation", "dtypes": DTYPES, "requires": ["torchao"]}
SCALER_BLOCK = 256


@implements("nf4_quantize", **_HOW)
def nf4_quantize(W: Any, block: int) -> tuple[Any, Any]:
    """Return the bytes of `to_nf4` and the absmax by which it divides, before it makes int8 of it in a way of its own.

    Raises Unsupported for what it refuses by assertion: three dimensions, and sizes that its blocks do not divide.
    """
    from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

    if W.dim() > 2 or W.numel() % (block * SCALER_BLOCK):
        raise Unsupported(f"torchao takes matrices of whole blocks of {block} x {SCALER_BLOCK} elements only")
    packed = nf4_tensor.to_nf4(W, block, SCALER_BLOCK)
    return packed.quantized_data.flatten(), nf4_tensor.get_block_absmax(W.flatten(), block).float()


@implements("adamw8bit_step", **_HOW)
def adamw8bit_step(p: Any, g: Any, step: int, **others: Any) -> tuple[Any, ...]:
    """Take one step of AdamW8bit from the state given. others: m, m_absmax, v, v_absmax and the optimizer's knobs.

    Raises Unsupported for sizes at which torchao keeps 32-bit states.
    """
    import torch
    from torchao.optim import AdamW8bit

    given = {name: others.pop(name) for name in ("m", "m_absmax", "v", "v_absmax")}
    if p.numel() < 4096 or p.numel() % 256:
        raise Unsupported("torchao keeps 32-bit states for fewer than 4096 elements, or no multiple of 256")
    p = torch.nn.Parameter(p.clone())
    p.grad = g.clone()
    optimizer = AdamW8bit([p], **others)
    state = {"step": torch.tensor(step - 1.0)}
    for theirs, ours, signed in (("exp_avg", "m", True), ("exp_avg_sq", "v", False)):
        moment = optimizer._new_buffer(p, signed)
        moment.codes.copy_(given[ours].view(p.shape))
        moment.scale.copy_(given[f"{ours}_absmax"])
        state[theirs] = moment
    optimizer.state[p].update(state)
    with torch.compiler.set_stance("force_eager"):  # it would compile anew for every shape
        optimizer.step()
    m, v = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
    return p.detach(), m.codes.flatten(), m.scale, v.codes.flatten(), v.scale


def implementations() -> list[Implementation]:
    """Return all that this file offers."""
    return [one for one in globals().values() if isinstance(one, Implementation)]
