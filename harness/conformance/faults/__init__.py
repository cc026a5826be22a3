"""Planted faults: copies of the reference with one mistake each, which the checks must notice (`check --self-test`).

There is one file per Method, base or group of Operations. Most faults replace code lines. Such a fault is a row of the
table `FAULTS` in its file. The table is formatted by hand, so that the wrong code is next to the right code:

    line_fault("dora", "does_not_detach_the_norm", ["gradient"],
        "norm.detach() if self.detach_norm else norm", "norm", values={"rank": 3, "alpha": 8.0}),

Any other fault is a function that changes a copy of the source. A decorator names the target (a Method, an Operation, a
quantised base or the loaders), and the checks that must catch the fault:

    @planted("lora", "merge", values={"rank": 3, "alpha": 8.0})
    def forgets_to_unmerge(copy: PatchedCopy) -> None:
        copy.change_adapted(lambda adapted: setattr(adapted, "unmerge", lambda: None))

`planted_in_methods` plants a fault in every Method to which the fault applies. The fault is tried in the Method's
FaultCase `CASE`, in the file named like the Method. A Method without `CASE` gets no such faults.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from harness.conformance import parity_suite
from harness.conformance.case_role import Dtype
from harness.conformance.case_selection import Values
from harness.conformance.faults.patched_copy import PatchedCopy
from harness.methods.registry import TargetKind

Spoil = Callable[[PatchedCopy], None]


@dataclass(frozen=True)
class FaultCase:
    """The case in which a planted fault is tried. Each expected check must notice the fault there; other checks may."""

    values: Values = field(default_factory=dict)
    """Values of the Method's config, or of an Operation's case."""
    dtype: Dtype = "float32"
    layer: parity_suite.Kind = "linear"
    tokens: int = 9
    inputs: int = 40
    """Number of input features of the parity model's first layer. The second layer has as many output features."""
    outputs: int = 24
    magnitude: parity_suite.Magnitude = "normal"
    weights: parity_suite.WeightSize = "normal"
    model: parity_suite.ModelForm = "plain"
    adapter: str = ""
    """Name of the adapter in suites/adapters, if the target is a loader. Otherwise empty."""

    def __str__(self) -> str:
        if self.adapter:
            return f"{self.adapter} {self.dtype}"
        shape = f"{self.tokens}x{self.inputs}x{self.outputs}"
        odd = {"magnitude": self.magnitude, "weights": self.weights, "model": self.model}
        sizes = parity_suite.in_words({name: value for name, value in odd.items() if value not in ("normal", "plain")})
        return " ".join(filter(None, [parity_suite.in_words(self.values), self.layer, shape, sizes, self.dtype]))

    def of_kind(self, kind: TargetKind) -> parity_suite.AnyCase:
        """Convert this case to a case of a parity suite for targets of this kind."""
        if kind == "operation":
            return parity_suite.OperationCase(self.values, self.dtype)
        if kind == "loader":
            return parity_suite.LoaderCase(self.adapter, self.dtype)
        shape = {"tokens": self.tokens, "in": self.inputs, "out": self.outputs}
        of = parity_suite.CaseShape.model_validate(shape)
        return parity_suite.MethodCase(
            self.values, self.layer, of, self.dtype, self.model, magnitude=self.magnitude, weights=self.weights
        )


@dataclass(frozen=True)
class Fault:
    """A mistake planted in the reference of one target: a Method, an Operation, a quantised base or the loaders."""

    name: str
    target: str
    spoil: Spoil
    """Function that makes the mistake in a copy of the target's source code."""
    expected: tuple[str, ...]
    """Checks that must catch the fault."""
    case: FaultCase


@dataclass(frozen=True)
class MethodsFault:
    """A mistake planted in every Method to which it applies."""

    name: str
    spoil: Spoil
    expected: tuple[str, ...]
    only: Collection[str]
    adds_layers: bool | None
    values: Mapping[str, Any]

    def planted(self, cases: Mapping[str, FaultCase], checks_of: Mapping[str, Collection[str]]) -> Iterator[Fault]:
        """Yield the fault for each Method to which it applies.

        cases: Method -> case in which the fault shows. checks_of: Method -> checks of its parity suite.
        """
        for method, case in cases.items():
            checks = checks_of[method]
            applies = not self.only or method in self.only
            if self.adds_layers is not None:  # only a Method that adds tensors has a start to check
                applies &= self.adds_layers is ("initial" in checks)
            if applies and set(self.expected) <= set(checks):
                where = replace(case, values={**case.values, **self.values})
                yield Fault(self.name, method, self.spoil, self.expected, where)


def line_fault(target: str, name: str, expected: Collection[str], *lines: str, file: str = "", **case: Any) -> Fault:
    """Return a fault of `target` that replaces pieces of code.

    lines: the right code, then the wrong code that replaces it; further such pairs may follow. file: file with the
    right code, e.g. `nf4`; by default, that of the target. case: fields of the FaultCase that differ from the default.
    """

    def spoil(copy: PatchedCopy) -> None:
        for right, wrong in zip(lines[::2], lines[1::2], strict=True):
            copy.replace_line(right, wrong, file)

    return Fault(name, target, spoil, tuple(expected), FaultCase(**case))


def planted(target: str, *expected: str, **case: Any) -> Callable[[Spoil], Fault]:
    """Return a decorator that makes a function a fault of `target`.

    expected: checks that must catch the fault. case: fields of the FaultCase that differ from the default.
    """

    def wrap(spoil: Spoil) -> Fault:
        return Fault(spoil.__name__, target, spoil, expected, FaultCase(**case))

    return wrap


def planted_in_methods(
    *expected: str, only: Collection[str] = (), adds_layers: bool | None = None, **values: Any
) -> Callable[[Spoil], MethodsFault]:
    """Return a decorator that makes a function a fault of every Method whose parity suite has the expected checks.

    expected: checks that must catch the fault. only: if not empty, plant the fault only in these Methods. adds_layers:
    True plants the fault only in Methods that wrap the base's layers in layers of their own, False only in the other
    Methods. values: values of the Method's config, added to those of the Method's CASE.
    """

    def wrap(spoil: Spoil) -> MethodsFault:
        return MethodsFault(spoil.__name__, spoil, expected, only, adds_layers, values)

    return wrap


@cache
def every() -> tuple[Fault, ...]:
    """Return all faults, file by file."""
    modules = {m.name: vars(importlib.import_module(f"{__name__}.{m.name}")) for m in pkgutil.iter_modules(__path__)}
    cases = {name: found["CASE"] for name, found in modules.items() if isinstance(found.get("CASE"), FaultCase)}
    checks_of = {name: parity_suite.load_plan(name).checks for name in cases}
    faults: list[Fault] = []
    for found in modules.values():
        faults += found.get("FAULTS", [])
        for one in found.values():
            if isinstance(one, Fault):
                faults.append(one)
            elif isinstance(one, MethodsFault):
                faults += one.planted(cases, checks_of)
    return tuple(faults)
