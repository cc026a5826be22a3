"""What a measure is: a function that computes one quantity from a model's shape, a method and arithmetic. No torch here.

A module of `harness.claims.measures` marks its functions `@measure(dimension)`. Their parameters are what a claim's `with:`
may say; annotations say what each may be. torch is imported inside them, so that files are checked without it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, create_model

from harness import resources
from harness.claims.printed_number import Dimension
from harness.errors import did_you_mean

Number = int | float | Fraction


@dataclass(frozen=True)
class MeasureResult:
    """What a measure found. value: a number in base units, or of a property whether it holds.

    how: the arithmetic, so that a reader can do it again by hand. most: where the paper leaves something open, or what was
    measured is uncertain, the largest that it can be, and `value` the least. within: where the value is computed from
    printed figures, which are rounded, the least and the most that these allow it to be.
    """

    value: Number | bool
    how: str
    most: Number | None = None
    within: tuple[Number, Number] | None = None


@dataclass(frozen=True)
class Nested:
    """Marks a parameter that is a number, or what another measure finds.

    dimensions: what that measure may be in; empty for all but properties. several: whether it is a list of them.
    """

    dimensions: tuple[Dimension, ...] = ()
    several: bool = False


@dataclass(frozen=True)
class Measure:
    """A measure: its name, what it is in, what `with:` may say (a pydantic model), and the function."""

    name: str
    dimension: Dimension
    arguments: type[BaseModel]
    function: Callable[..., MeasureResult]
    nested: Mapping[str, Nested] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.function) or ""


Quantity = Annotated[Any, Nested()]
"""A parameter that is a number the paper prints, or `{measure: NAME, with: {...}}`; the function gets a Fraction."""
Quantities = Annotated[list[Any], Nested(several=True)]
"""A parameter that is a list of such."""
Count = Annotated[Any, Nested(("count", "number", "ratio"))]
"""A Quantity that counts things."""
Counts = Annotated[list[Any], Nested(("count", "number", "ratio"), several=True)]
"""A list of such."""
Sizes = Annotated[list[Any], Nested(("bytes",), several=True)]
"""A list of Quantities in bytes."""


class NotRunError(Exception):
    """Raised by a measure that cannot be taken here: what it needs, as a sentence."""


FOLDER = "folder"
"""In the context of a validation: where the paths of a file start."""


def _shape(address: str, info: ValidationInfo) -> str:
    from harness.assets import shapes
    from harness.errors import UsageError

    name = address.removeprefix(shapes.PREFIX)
    if wrong := shapes.address_problem(name):
        raise ValueError(f"{wrong}; a path begins with ./" if "/" in name or name.endswith(".json") else wrong)
    if not name.startswith(shapes.PATH_STARTS):
        return name
    try:
        path = (info.context or {}).get(FOLDER, Path()) / resources.user_path(name)
        file = path / "config.json" if path.is_dir() else path
        shapes.read_config(file)
    except UsageError as error:
        raise ValueError(f"{error.what}; {error.hint}") from error
    return str(file.resolve())


def _method(name: str) -> str:
    from harness.methods.spec import methods

    if name not in (there := methods()):
        raise ValueError(f"no method is called `{name}`; {did_you_mean(name, there)}")
    return name


Model = Annotated[str, AfterValidator(_shape)]
"""A parameter that names a shape: a preset, or the path of a config.json."""
Method = Annotated[str, AfterValidator(_method)]
"""A parameter that names a Method; `config`, if there is one, is checked against it."""
Config = dict[str, Any]
"""A Method's config, as in a suite."""
Positive = Annotated[int, Field(ge=1)]


def measure(dimension: Dimension) -> Callable[[Callable[..., MeasureResult]], Callable[..., MeasureResult]]:
    """Mark a function as a measure of this dimension."""

    def mark(function: Callable[..., MeasureResult]) -> Callable[..., MeasureResult]:
        function.dimension = dimension  # type: ignore[attr-defined]
        return function

    return mark


@cache
def measures() -> Mapping[str, Measure]:
    """Return every measure by its name: those that the modules of `harness.claims.measures` mark."""
    from harness.claims import measures as room

    found: dict[str, Measure] = {}
    for module in pkgutil.iter_modules(room.__path__):
        loaded = importlib.import_module(f"{room.__name__}.{module.name}")
        for name, function in vars(loaded).items():
            if hasattr(function, "dimension") and function.__module__ == loaded.__name__:
                found[name] = _measure(name, function)
    return dict(sorted(found.items()))


def _measure(name: str, function: Any) -> Measure:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    nested: dict[str, Nested] = {}
    for key, parameter in inspect.signature(function).parameters.items():
        marks = [extra for extra in getattr(hints[key], "__metadata__", ()) if isinstance(extra, Nested)]
        if marks:
            nested[key] = marks[0]
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[key] = (hints[key], default)
    strict = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    return Measure(name, function.dimension, create_model(name, __config__=strict, **fields), function, nested)
