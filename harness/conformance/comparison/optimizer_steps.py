"""The optimizer with which checks take steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from harness.conformance.tolerance_constants import EPSILON, LEARNING_RATE_EPS
from harness.methods.spec import Adapted


def optimizer_of(
    adapted: Adapted, tensors: Iterable[Tensor], dtype: str, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Return the Method's own optimizer. If there is none, return AdamW with weight decay over `tensors`.

    dtype: dtype of the subject. The learning rate is so large that a step moves the tensors by many units in the last
    place of this dtype. A smaller step would disappear in the rounding of the tensors, and an optimizer that does
    nothing would pass.

    AdamW's first step is lr g / (|g| + eps). Here eps is large. With a small eps, the few elements with a gradient near
    zero would dominate the error, and two correct programs could differ by any factor. In float16 the usual eps, 1e-8,
    would even be zero.

    fused: use torch's fused AdamW. Like bitsandbytes' optimizers, it writes into the tensors without raising their
    `_version`. A layer with a cache that relies on `_version` is then wrong after the step.
    """
    lr = max(1e-2, LEARNING_RATE_EPS * EPSILON[dtype])
    return adapted.optimizer(lr, 0.1) or torch.optim.AdamW(list(tensors), lr=lr, weight_decay=0.1, eps=1.0, fused=fused)
