"""AdamW in two forms: those of torch and transformers. Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101, algorithm 2.

With the moments m = beta1 m + (1 - beta1) g and v = beta2 v + (1 - beta2) g^2, and c1 = 1 - beta1^t, c2 = 1 - beta2^t:

    torch:         p = (1 - lr weight_decay) p - lr (m / c1) / (sqrt(v / c2) + eps)
    transformers:  p = (1 - lr weight_decay) (p - lr sqrt(c2) / c1 m / (sqrt(v) + eps))

`torch` is torch.optim.AdamW. `transformers` is the AdamW of older transformers versions, which peft's LoRA-FA copies. This
form decays after the update, and adds eps before the bias correction, as in section 2 of Adam's paper (arXiv:1412.6980).
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Form = Literal["torch", "transformers"]


def adamw_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    form: Form = "torch",
    bias_correction: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, m and v after step number `step` (from 1). All tensors have the shape and the dtype of p.

    bias_correction: if False, c1 and c2 are 1. In 16 bits, every operation rounds here; an implementation may compute in
    float32, and round only the results.
    """
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    c1, c2 = (1 - beta**step if bias_correction else 1.0 for beta in betas)
    if form == "torch":
        p = (1 - lr * weight_decay) * p - lr / c1 * (m / (v.sqrt() / math.sqrt(c2) + eps))
    else:
        p = (1 - lr * weight_decay) * (p - lr * math.sqrt(c2) / c1 * (m / (v.sqrt() + eps)))
    return p, m, v
