"""Planted faults: copies of the reference with one mistake each, to see whether the checks notice.

One file per Method, Operation or base. A fault is a function that spoils a copy of the source:

    @planted("dora", "gradient")
    def does_not_detach_the_norm(its: Copy) -> None:
        its.line("norm.detach() if self.detach_norm else norm", "norm")

It names who it is a fault of and the checks that a reader would expect to catch it; `planted_in` names several.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from harness.conformance import parity_suite
from harness.conformance.faults.patched_copy import PatchedCopy


@dataclass(frozen=True)
class Slice:
    """The one case of the parity suite in which a fault shows.

    values: of the Method's config, or the arguments of an Operation's case. layer, tokens, inputs, outputs: the shape; the
    small model's first layer maps inputs to outputs, its second maps back.
    """

    values: dict[str, Any] = field(default_factory=dict)
    dtype: parity_suite.Dtype = "float32"
    layer: parity_suite.Kind = "linear"
    tokens: int = 9
    inputs: int = 40
    outputs: int = 24

    def __str__(self) -> str:
        shape = f"{self.tokens}x{self.inputs}x{self.outputs}"
        return " ".join(filter(None, [parity_suite.in_words(self.values), self.layer, shape, self.dtype]))


@dataclass(frozen=True)
class Fault:
    """A mistake: what it does to a copy, of what, where it shows, and the checks that should catch it."""

    name: str
    target: str
    spoil: Callable[[PatchedCopy], None]
    expected: tuple[str, ...]
    where: Slice


Faults = tuple[Fault, ...]


def planted(target: str, *expected: str, **where: Any) -> Callable[[Callable[[PatchedCopy], None]], Fault]:
    """Make a fault of `target` of a function. where: of a Slice, where the usual one will not do."""

    def wrap(spoil: Callable[[PatchedCopy], None]) -> Fault:
        return Fault(spoil.__name__, target, spoil, expected, Slice(**where))

    return wrap


def planted_in(
    targets: Mapping[str, Mapping[str, Any]], *expected: str
) -> Callable[[Callable[[PatchedCopy], None]], Faults]:
    """Make one fault of each target; targets: name -> of its Slice, where the usual one will not do."""

    def wrap(spoil: Callable[[PatchedCopy], None]) -> Faults:
        return tuple(planted(target, *expected, **where)(spoil) for target, where in targets.items())

    return wrap


@cache
def every() -> tuple[Fault, ...]:
    """Return all faults, file by file."""
    return tuple(
        fault
        for module in pkgutil.iter_modules(__path__)
        for made in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        for fault in (made if isinstance(made, tuple) else (made,))
        if isinstance(fault, Fault)
    )
