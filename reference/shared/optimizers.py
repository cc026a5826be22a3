"""Two helpers for optimizers: calling the closure of a step, and loading states whose dtype is not that of the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Call the closure of a step, which computes loss and gradients. Return the loss, or None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Copy the tensors of `state_dict` into the state of `optimizer`, because torch casts them when it loads them."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, p in zip(saved, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        for name, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.detach().to(p.device, copy=True)
