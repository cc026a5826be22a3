"""The Operations: kernel-level pieces, each with its arguments, its reference and how its outputs are judged.

One file each; a file that defines `OPERATION` is one. An implementation of kind `operation` is a function of the same
arguments that returns the outputs in order, one tensor or a tuple.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.conformance.tolerance import Judgement


@dataclass(frozen=True)
class Operation:
    """An Operation.

    outputs: their names, in order. arguments: (dtype, generator, **case) -> the keyword arguments of a call. reference:
    the same call by the reference; what is floating in the arguments may come in float64. differentiable: the arguments
    whose gradients are compared. judge: (outputs of the subject, arguments) -> Judgement, where the noise floor is not the
    rule; None: every output within the noise floor of the reference in float64.
    """

    name: str
    outputs: tuple[str, ...]
    arguments: Callable[..., dict[str, Any]]
    reference: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    judge: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Judgement] | None = None

    def named(self, returned: Any) -> dict[str, Tensor]:
        """Name what a call returned. Raises TypeError if it is not the Operation's outputs."""
        several = (returned,) if isinstance(returned, Tensor) else returned
        if not isinstance(several, tuple | list) or len(several) != len(self.outputs):
            raise TypeError(f"{self.name} should return {', '.join(self.outputs)}; got {type(returned).__name__}")
        if odd := [n for n, t in zip(self.outputs, several, strict=True) if not isinstance(t, Tensor)]:
            raise TypeError(f"{self.name}: {', '.join(odd)} should be a tensor")
        return dict(zip(self.outputs, several, strict=True))


@dataclass(frozen=True)
class OperationSubject:
    """An implementation of an Operation, and the arguments of one case."""

    operation: Operation
    function: Callable[..., Any]
    dtype: str
    arguments: dict[str, Any]

    @property
    def method(self) -> str:
        """The name by which results are called."""
        return self.operation.name

    def call(self, **changed: Any) -> dict[str, Tensor]:
        """Call the implementation on clones of the arguments."""
        return self.operation.named(self.function(**{**cloned(self.arguments), **changed}))


def cloned(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Clone every tensor inside arguments; floating ones into `dtype`, if it is given."""
    if isinstance(value, Tensor):
        copy = value.detach().clone(memory_format=torch.preserve_format)
        return copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy
    if isinstance(value, dict):
        return {key: cloned(one, dtype) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cloned(one, dtype) for one in value)
    return value


@cache
def every() -> dict[str, Operation]:
    """Map names to Operations."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        operation = getattr(importlib.import_module(f"{__name__}.{module.name}"), "OPERATION", None)
        if operation is not None:
            found[operation.name] = operation
    return found
