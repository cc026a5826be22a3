"""AdamW with blockwise 8-bit states. Dettmers et al., ICLR 2022, arXiv:2110.02861. An Operation, not a Method.

Both moments are stored as 8-bit codes of the dynamic map (reference/operations/dynamic_map), with one absmax per block of
256 elements. A step decodes the moments to 32 bits, updates as Adam does, and encodes the moments again, so that they are
rounded to codes only between steps. The first moment uses the signed map. The second moment is never negative and uses the
unsigned map.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise
from reference.shared.optimizers import loss_of, restore_dtypes
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2110.02861v2, section 2; map, block size and minimum size as in bitsandbytes",
    deviations=(
        Deviation(
            topic="block size",
            paper="2048",
            here="256",
            why="bitsandbytes uses it today",
        ),
        Deviation(
            topic="least size",
            paper="embedding layers have 32-bit states (the stable embedding layer)",
            here="tensors of fewer than 4096 elements have 32-bit states; embeddings are no exception",
            why="bitsandbytes has the same min_8bit_size; its exception for nn.Embedding needs a manager that knows "
            "the modules",
        ),
        Deviation(
            topic="weight decay",
            paper="none in its equations",
            here="decoupled, before the update: p is multiplied by 1 - lr * weight_decay first",
            why="torch's AdamW and bitsandbytes on the CPU do the same; bitsandbytes on CUDA decays after the "
            "update, and so reduces the update too, by lr * weight_decay of it",
        ),
        Deviation(
            topic="eps",
            paper="added to sqrt(V), without a printed bias correction",
            here="added to sqrt(V / (1 - beta2^t))",
            why="torch's AdamW and bitsandbytes, on the CPU and on CUDA, do the same",
        ),
        Deviation(
            topic="search of the code",
            paper="nearest",
            here="nearest; an element exactly between two values takes the lower",
            why="bitsandbytes on the CPU first rounds m / absmax to one of 65,536 values in [-1, 1], which are 3e-5 "
            "apart and do not include 0. It loses finer codes and decodes a zero to 2e-5 absmax, so that a parameter "
            "without any gradient moves",
        ),
        Deviation(
            topic="sign of the first moment",
            paper="not stated",
            here="the nearest code, which for a small negative number may be 0",
            why="bitsandbytes on CUDA takes the next code instead of 0, so that the sign stays",
        ),
        Deviation(
            topic="gradients that are not finite",
            paper="not stated",
            here="used, as in torch's AdamW",
            why="bitsandbytes on CUDA skips such a parameter and sets its moments to 0",
        ),
    ),
)

BLOCK = 256
"""Number of elements that share one absmax."""
MIN_8BIT_SIZE = 4096
"""A tensor with at least this many elements has 8-bit moments. A smaller tensor has moments in float32 or float64."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a step computes: float64 for float64 parameters, and float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def init_state(p: Tensor, min_8bit_size: int = MIN_8BIT_SIZE) -> dict[str, Tensor]:
    """Return the state of a parameter before the first step. Both moments are zero.

    m, v: uint8 codes of the moments, flat. m_absmax, v_absmax: one float32 number per block. Every absmax is 0, so that
    any code means 0. If p has fewer than `min_8bit_size` elements, the state has only m and v, in the working dtype.
    """
    n = p.numel()
    if n < min_8bit_size:
        dtype = working_dtype(p.dtype)
        return {name: torch.zeros(n, dtype=dtype, device=p.device) for name in ("m", "v")}
    codes = {name: torch.zeros(n, dtype=torch.uint8, device=p.device) for name in ("m", "v")}
    blocks = -(-n // BLOCK)
    return codes | {f"{name}_absmax": torch.zeros(blocks, dtype=torch.float32, device=p.device) for name in ("m", "v")}


def state_bytes(numel: int, min_8bit_size: int = MIN_8BIT_SIZE) -> int:
    """Return the bytes of both moments: 2 per element plus 8 per block. Below `min_8bit_size`: 8 per element (float32)."""
    return 8 * numel if numel < min_8bit_size else 2 * numel + 8 * -(-numel // BLOCK)


def moments(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the first and the second moment of a state. They are decoded and flat, in `dtype`."""
    if state["m"].dtype != torch.uint8:
        return state["m"].to(dtype), state["v"].to(dtype)
    m = dequantize_blockwise(state["m"], state["m_absmax"], dynamic_map(signed=True), BLOCK)
    v = dequantize_blockwise(state["v"], state["v_absmax"], dynamic_map(signed=False), BLOCK)
    return m.to(dtype), v.to(dtype)


@torch.no_grad()
def adamw8bit_step(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Take step number `step` (from 1). Change p and `state` in place.

        m_t = beta1 m_{t-1} + (1 - beta1) g          v_t = beta2 v_{t-1} + (1 - beta2) g^2
        p_t = (1 - lr weight_decay) p_{t-1} - lr (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

    p and g have the same shape, and any floating dtypes. The update uses the moments before they are encoded as 8-bit
    codes. It rounds p to its own dtype only once.
    """
    dtype = working_dtype(p.dtype)
    wide, g = p.to(dtype, copy=True), g.to(dtype)
    m, v = (t.view(p.shape) for t in moments(state, dtype))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    wide *= 1 - lr * weight_decay
    wide -= lr / (1 - betas[0] ** step) * (m / (v.sqrt() / math.sqrt(1 - betas[1] ** step) + eps))
    p.copy_(wide)
    for name, value, signed in (("m", m, True), ("v", v, False)):
        if state[name].dtype == torch.uint8:
            codes, absmax = quantize_blockwise(value, dynamic_map(signed), BLOCK)
            state[name].copy_(codes)
            state[f"{name}_absmax"].copy_(absmax)
        else:
            state[name].copy_(value.flatten())


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit states for large tensors. The state of a parameter is the result of `init_state`, plus `step`."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"min_8bit_size": min_8bit_size})

    def step(self, closure: Any = None) -> Any:
        """Take one step of every parameter that has a gradient. Return the loss of `closure`, or None without a closure."""
        loss = loss_of(closure)
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, **init_state(p, group["min_8bit_size"])}
                state["step"] += 1
                adamw8bit_step(p, p.grad, state, step=state["step"], **options)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of the method `state_dict`. The codes stay uint8, although torch alone would cast them to floats."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)
