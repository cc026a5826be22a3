"""The optimizers with which checks take steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.conformance.tolerance_constants import EPSILON, LEARNING_RATE_EPS
from harness.methods.spec import Adapted

DECAY = 0.1
"""Weight decay, unless a check chooses another."""
AdamW = Literal["plain", "fused", "bitsandbytes"]
"""Implementation of AdamW: torch's default, torch's fused one, or the one of bitsandbytes with moments of 32 bits.

The last two write into the tensors without incrementing `_version`. A layer with a cache that relies on `_version` is
then wrong after the step. Measured with torch 2.13 and bitsandbytes 0.50.2 on a CPU: no optimizer of bitsandbytes
increments `_version` (AdamW, AdamW8bit, PagedAdamW, Lion and LAMB, in float32, float64 and 16 bits), but all of them call
the hooks of `torch.optim.optimizer.register_optimizer_step_post_hook`.
"""


def optimizer_of(
    adapted: Adapted, tensors: Iterable[Tensor], dtype: str, *, adamw: AdamW = "plain", decay: float = DECAY
) -> torch.optim.Optimizer:
    """Return the Method's own optimizer. If there is none, return AdamW with weight decay over `tensors`.

    dtype: dtype of the subject. The learning rate is so large that a step moves the tensors by many units in the last
    place of this dtype. A smaller step would disappear in the rounding of the tensors, and an optimizer that does
    nothing would pass.

    AdamW's first step is lr g / (|g| + eps). Here eps is large. With a small eps, the few elements with a gradient near
    zero would dominate the error, and two correct programs could differ by any factor.
    """
    lr = max(1e-2, LEARNING_RATE_EPS * EPSILON[dtype])
    own = adapted.optimizer(lr, decay)
    return own or _implementation(adamw)(list(tensors), lr=lr, weight_decay=decay, eps=1.0)


@cache
def bitsandbytes_problem(device: torch.device) -> str:
    """Return why the AdamW of bitsandbytes takes no step on `device`, or an empty string if it does."""
    parameter = nn.Parameter(torch.ones(2, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        _implementation("bitsandbytes")([parameter]).step()
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:  # old releases: no CPU
        return f"{type(error).__name__}: {error}"
    return ""


def _implementation(adamw: AdamW) -> Callable[..., Any]:
    if adamw == "bitsandbytes":
        from bitsandbytes.optim import AdamW as OfBitsandbytes

        return OfBitsandbytes  # type: ignore[no-any-return]
    return partial(torch.optim.AdamW, fused=adamw == "fused")
