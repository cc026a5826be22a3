"""Decorators with which autocast casts the arguments of an Operation.

Autocast is off within the Operation and its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_T = TypeVar("_T", bound=Callable[..., Any])


def cast_by_autocast(operation: _T) -> _T:
    """Return an Operation, wrapped so that autocast casts its arguments as it casts those of torch's `linear`.

    Under autocast, floating tensors of the arguments and of lists in them are cast to autocast's dtype. float64 stays, as
    in torch. The Operation then runs without autocast, so that all its tensors have one dtype. Gradients have the dtypes
    of the arguments that the caller gave.
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
