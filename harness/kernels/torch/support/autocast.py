"""Decorators for Operations under autocast: cast the arguments, then compute with autocast off."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_T = TypeVar("_T", bound=Callable[..., Any])


def cast_by_autocast(operation: _T) -> _T:
    """Wrap an Operation so that autocast casts its arguments, as it casts those of torch's `linear`.

    Under autocast, floating tensors among the arguments, or in lists among them, are cast to autocast's dtype. float64
    stays, as in torch. The Operation then runs without autocast, so that all its tensors have one dtype. Gradients have
    the dtypes of the original arguments.
    """

    @wraps(operation)
    def cast(x: Tensor, *rest: Any, **named: Any) -> Any:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return operation(x, *rest, **named)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return operation(
                *(_cast(one, dtype) for one in (x, *rest)), **{n: _cast(t, dtype) for n, t in named.items()}
            )

    return cast  # type: ignore[return-value]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    return [_cast(one, dtype) for one in value] if isinstance(value, list | tuple) else value


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `backward` of an autograd function so that it runs without autocast.

    The wrapped function may then write into memory of a fixed dtype.
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
    """Wrap a `backward` as `outside_autocast` does, and let a second derivative raise RuntimeError."""
    return outside_autocast(once_differentiable(backward))
