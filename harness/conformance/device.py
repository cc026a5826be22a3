"""Where an implementation is tried: on an accelerator, if it names one that is there, else on the CPU, if it names that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from harness.errors import Unsupported


def device_of(devices: Iterable[str]) -> torch.device:
    """Return the device to try an implementation of these `devices` on. Raises Unsupported if none of them is here."""
    named = tuple(devices)
    if "cuda" in named and torch.cuda.is_available():
        return torch.device("cuda")
    if "cpu" in named:
        return torch.device("cpu")
    raise Unsupported(f"it runs on {', '.join(named) or 'no device'}, and there is none here")


def placed(value: Any, device: torch.device) -> Any:
    """Return arguments with every tensor in them on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: placed(one, device) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(placed(one, device) for one in value)
    return value
