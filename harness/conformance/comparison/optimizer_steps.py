"""Optimizer of the checks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from harness.methods.spec import Adapted


def optimizer_of(adapted: Adapted, tensors: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the Method's own optimizer, or AdamW with weight decay over `tensors`.

    AdamW's first step is lr g / (|g| + eps). With a small eps, the few elements with a gradient near zero would
    dominate the error, so that two correct programs could differ by any factor. The usual eps, 1e-8, is also zero in
    float16.
    """
    own = adapted.optimizer(1e-2, 0.1)
    return own or torch.optim.AdamW(list(tensors), lr=1e-2, weight_decay=0.1, eps=1.0)
