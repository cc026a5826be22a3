"""Lion with a blockwise 8-bit moment. Chen et al., NeurIPS 2023, arXiv:2302.06675, algorithm 2. An Operation, not a Method.

Lion has one moment m, and moves every weight by lr up or down, whatever the size of its gradient:

    p = (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g)
    m = beta2 m + (1 - beta2) g

The moment is stored as 8-bit codes of the signed dynamic map with one absmax per block of 256 elements, as in 8-bit AdamW
(reference/operations/adamw8bit). A step decodes the moment, computes, and encodes the new moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.operations.adamw8bit import BLOCK, working_dtype
from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2302.06675, algorithm 2; map and block size as in bitsandbytes",
    deviations=(
        Deviation(
            topic="weight decay",
            paper="p - lr (sign(beta1 m + (1 - beta1) g) + weight_decay p)",
            here="the same: the decay is outside the sign",
            why="bitsandbytes' Lion for 32 bits once added the decay to the gradient, inside the sign (bitsandbytes#1992)",
        ),
        Deviation(
            topic="a sum of exactly 0",
            paper="not stated",
            here="does not move the weight",
            why="torch.sign does the same, and so does bitsandbytes",
        ),
        Deviation(
            topic="8 bits",
            paper="a moment in full precision",
            here="codes of the nearest value; see reference/operations/adamw8bit.py for where bitsandbytes differs",
            why="bitsandbytes' Lion8bit",
        ),
    ),
)


@torch.no_grad()
def lion8bit_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    m_absmax: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, and the codes and the absmax of m, after a step.

    p, g: one shape, any floating dtypes. m: uint8 codes, flat. m_absmax: float32, one per block. The argument
    of the sign is computed in float32, or in float64 if p has this dtype. p is rounded to its own dtype once.
    """
    dtype, levels = working_dtype(p.dtype), dynamic_map(signed=True)
    wide, moment = g.to(dtype), dequantize_blockwise(m, m_absmax, levels, BLOCK).to(dtype).view(p.shape)
    direction = (betas[0] * moment + (1 - betas[0]) * wide).sign()
    after = (1 - lr * weight_decay) * p.to(dtype) - lr * direction
    codes, absmax = quantize_blockwise(betas[1] * moment + (1 - betas[1]) * wide, levels, BLOCK)
    return after.to(p.dtype), codes, absmax
