"""LAMB with blockwise 8-bit moments. You et al., ICLR 2020, arXiv:1904.00962, algorithm 2. An Operation, not a Method.

LAMB is Adam, but it rescales the update of each tensor to lr times the norm of the tensor:

    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
    p = p - lr ||p|| / ||u|| u

m and v are Adam's moments. The ratio of the norms is the trust ratio. If p or u has a NaN, this ratio is NaN,
and all of p becomes NaN. Both moments are stored in 8 bits, as in 8-bit AdamW (reference/operations/adamw8bit).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.operations import adamw8bit
from reference.operations.dynamic_map import dynamic_map, quantize_blockwise
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:1904.00962v5, algorithm 2; map and block size as in bitsandbytes",
    deviations=(
        Deviation(
            topic="function phi of the norm of p",
            paper="any bounded function; the authors take the norm itself",
            here="the norm itself",
            why="as the authors",
        ),
        Deviation(
            topic="a norm of 0",
            paper="not stated",
            here="a trust ratio of 1",
            why="otherwise a tensor of zeros, such as LoRA's B at its start, would never move",
        ),
        Deviation(
            topic="trust ratio in bitsandbytes",
            paper="the ratio of the norms, above or below 1",
            here="as the paper",
            why="bitsandbytes' LAMB8bit has no trust ratio, so that its step is that of AdamW8bit; its 32-bit LAMB only "
            "shortens updates that are longer than `max_unorm` times the tensor",
        ),
    ),
)


@torch.no_grad()
def lamb8bit_step(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return p and the state after step number `step` (from 1). state: 8-bit moments, as from `adamw8bit.init_state`.

    The step is computed in float32, or in float64 if p has this dtype.
    """
    dtype = adamw8bit.working_dtype(p.dtype)
    wide, g = p.to(dtype), g.to(dtype)
    m, v = (t.view(p.shape) for t in adamw8bit.moments(state, dtype))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    update = m / (1 - betas[0] ** step) / (v.sqrt() / math.sqrt(1 - betas[1] ** step) + eps) + weight_decay * wide
    ratio = wide.norm() / update.norm()
    wide = wide - lr * torch.where((wide.norm() == 0) | (update.norm() == 0), 1.0, ratio) * update
    after: dict[str, Tensor] = {}
    for name, value, signed in (("m", m, True), ("v", v, False)):
        after[name], after[f"{name}_absmax"] = quantize_blockwise(value, dynamic_map(signed), adamw8bit.BLOCK)
    return wide.to(p.dtype), after
