"""Run backward passes without autocast. Autocast should cast only the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward of a Function, wrapped so that it runs without autocast.

    The wrapped backward may then write into memory of a fixed dtype.
    """

    @wraps(backward)
    def plain(ctx: Any, *dys: Tensor | None) -> Any:
        device = next((dy.device.type for dy in dys if dy is not None), None)
        if device is None or not torch.is_autocast_enabled(device):
            return backward(ctx, *dys)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *dys)

    return plain


def once_outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward, wrapped as by `outside_autocast`. A second derivative then raises RuntimeError."""
    return outside_autocast(once_differentiable(backward))
