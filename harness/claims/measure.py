"""Measures: functions that compute one quantity, or check one property, for claims. No torch here.

A function in a module of `harness.claims.measures` is marked `@measure(dimension)`. Its parameters are the keys of a claim's
`with:`, checked by their annotations. It imports torch inside, so that claim files are checked without torch.
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
    """The result of a measure."""

    value: Number | bool
    """A number in base units, or whether a property holds."""
    how: str
    """The arithmetic, so that a reader can repeat it."""
    most: Number | None = None
    """The largest possible value, if the paper omits something or the measurement is uncertain; `value` is the least."""
    within: tuple[Number, Number] | None = None
    """The range that rounded, printed figures allow, if the value is computed from such figures."""


@dataclass(frozen=True)
class Nested:
    """Marks a parameter that is a number, or the result of another measure."""

    dimensions: tuple[Dimension, ...] = ()
    """Allowed dimensions of the other measure. Empty: all dimensions except properties."""
    is_list: bool = False


@dataclass(frozen=True)
class Measure:
    """A measure found in `harness.claims.measures`."""

    name: str
    dimension: Dimension
    arguments: type[BaseModel]
    """Model of the keys of `with:`."""
    function: Callable[..., MeasureResult]
    nested: Mapping[str, Nested] = field(default_factory=dict)
    """Parameters that may be results of other measures."""

    @property
    def about(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.function) or ""


Quantity = Annotated[Any, Nested()]
"""A parameter that is a number the paper prints, or `{measure: NAME, with: {...}}`; the function gets a Fraction."""
Quantities = Annotated[list[Any], Nested(is_list=True)]
"""A parameter that is a list of Quantities."""
Count = Annotated[Any, Nested(("count", "number", "ratio"))]
"""A Quantity that counts things."""
Counts = Annotated[list[Any], Nested(("count", "number", "ratio"), is_list=True)]
"""A list of Counts."""
Sizes = Annotated[list[Any], Nested(("bytes",), is_list=True)]
"""A list of Quantities in bytes."""


class NotRunError(Exception):
    """Raised by a measure that cannot be computed here. The message names the missing requirement."""


FOLDER = "folder"
"""Key of the validation context: the folder to which paths of a claim file are relative."""


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
        raise ValueError(f"unknown method `{name}`; {did_you_mean(name, there)}")
    return name


Model = Annotated[str, AfterValidator(_shape)]
"""A parameter that names a shape: a preset, or the path of a config.json."""
Method = Annotated[str, AfterValidator(_method)]
"""A parameter that names a Method; a parameter `config` is checked against it."""
Config = dict[str, Any]
"""A Method's config, as in a suite."""
Positive = Annotated[int, Field(ge=1)]


def measure(dimension: Dimension) -> Callable[[Callable[..., MeasureResult]], Callable[..., MeasureResult]]:
    """Return a decorator that marks a function as a measure of this dimension."""

    def mark(function: Callable[..., MeasureResult]) -> Callable[..., MeasureResult]:
        function.dimension = dimension  # type: ignore[attr-defined]
        return function

    return mark


@cache
def measures() -> Mapping[str, Measure]:
    """Map names to measures: the marked functions in the modules of `harness.claims.measures`."""
    from harness.claims import measures as package

    found: dict[str, Measure] = {}
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
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
