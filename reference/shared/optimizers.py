"""Parts of the optimizers: the closure of a step, and loading of states whose dtype is not the parameter's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Call a step's closure, which computes loss and gradients, and return the loss. Without a closure, return None."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Replace the tensors of a loaded optimizer state by those of `state_dict`, because torch has changed their dtypes."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, p in zip(saved, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        for name, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.detach().to(p.device, copy=True)
