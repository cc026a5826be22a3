"""Backward passes under autocast, which is to cast what a forward pass computes and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Function's backward run without autocast: its products go into memory of the dtype that is there already."""

    @wraps(backward)
    def plain(ctx: Any, *dys: Tensor | None) -> Any:
        device = next((dy.device.type for dy in dys if dy is not None), None)
        if device is None or not torch.is_autocast_enabled(device):
            return backward(ctx, *dys)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *dys)

    return plain
