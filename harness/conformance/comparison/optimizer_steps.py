"""Optimizer of the checks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from harness.conformance.tolerance_constants import EPSILON, LEARNING_RATE_EPS
from harness.methods.spec import Adapted


def optimizer_of(adapted: Adapted, tensors: Iterable[Tensor], dtype: str) -> torch.optim.Optimizer:
    """Return the Method's own optimizer, or AdamW with weight decay over `tensors`.

    dtype: the subject's. Its learning rate moves the tensors by many of its units in the last place: a smaller movement
    would disappear in the rounding of the tensors, so that an optimizer that does nothing would pass.

    AdamW's first step is lr g / (|g| + eps). With a small eps, the few elements with a gradient near zero would
    dominate the error, so that two correct programs could differ by any factor. The usual eps, 1e-8, is also zero in
    float16.
    """
    lr = max(1e-2, LEARNING_RATE_EPS * EPSILON[dtype])
    return adapted.optimizer(lr, 0.1) or torch.optim.AdamW(list(tensors), lr=lr, weight_decay=0.1, eps=1.0)
