"""An Operation: its arguments, its reference, how its outputs are judged, and one implementation of it as a subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.conformance.comparison.tolerance_policies import Judgement

Judge = Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[Judgement, str]]


@dataclass(frozen=True)
class Operation:
    """An Operation.

    outputs: their names, in order. arguments: (dtype, generator, **case) -> the keyword arguments of a call. reference:
    the same call by the reference; what has the case's dtype in the arguments, and that dtype itself, may come as float64.
    differentiable: the arguments whose gradients are compared. judge: (outputs of the subject, arguments) -> Judgement and
    a detail, where the noise floor is not the rule; None: every output within the noise floor of the reference in float64.
    codes: the same for outputs that are codes, which the check `output_codes` then judges apart.
    """

    name: str
    outputs: tuple[str, ...]
    arguments: Callable[..., dict[str, Any]]
    reference: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    judge: Judge | None = None
    codes: Judge | None = None

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
    """An implementation of an Operation, and the arguments of one case. another: draws others of the same shapes."""

    operation: Operation
    function: Callable[..., Any]
    dtype: str
    arguments: dict[str, Any]
    another: Callable[[], dict[str, Any]]

    @property
    def method(self) -> str:
        """The name by which results are called."""
        return self.operation.name

    def call(self, **changed: Any) -> dict[str, Tensor]:
        """Call the implementation on clones of the arguments."""
        return self.operation.named(self.function(**{**cloned(self.arguments), **changed}))


def cloned(value: Any, dtypes: Mapping[torch.dtype, torch.dtype] | None = None) -> Any:
    """Clone every tensor inside arguments. dtypes: what is of one of these dtypes, or is one, becomes of the other.

    A float32 absmax in a bfloat16 case keeps its dtype: it is float32 by definition, and its rounding nobody's.
    """
    become = dtypes or {}

    def clone(one: Any) -> Any:
        if isinstance(one, torch.dtype):
            return become.get(one, one)
        if not isinstance(one, Tensor):
            return one
        copy = one.detach().clone(memory_format=torch.preserve_format)
        return copy.to(become.get(copy.dtype, copy.dtype))

    return mapped(value, clone)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return arguments with `change` done to everything in them, however deep it lies in dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: mapped(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(one, change) for one in value)
    return change(value)


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int, spread: float = 1.0) -> Tensor:
    """Return normal noise, drawn in float64 so that every dtype sees the same numbers."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype)
