"""Measures: functions that compute one quantity, or check one property, for claims. Imports no torch.

A function in a module of `harness.claims.measures` is marked `@measure(dimension)`. Its parameters are the keys under
`with:` in a claim. Their annotations decide which values are allowed. The function imports torch in its body, so that a
claim file can be checked without torch.
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
    """The largest possible value, if the paper omits something or the measurement is uncertain. `value` is then the
    least possible value. For a property, True means that the property is undecided."""
    within: tuple[Number, Number] | None = None
    """Least and largest value that the rounding of the paper's figures allows. None if the value is not computed from
    rounded figures of a paper."""


@dataclass(frozen=True)
class Nested:
    """Annotation of a measure's parameter whose value may be a number or the result of another measure."""

    dimensions: tuple[Dimension, ...] = ()
    """Allowed dimensions of the other measure. If empty, all dimensions except `property` are allowed."""
    is_list: bool = False


@dataclass(frozen=True)
class Measure:
    """A measure found in `harness.claims.measures`."""

    name: str
    dimension: Dimension
    arguments: type[BaseModel]
    """Pydantic model that checks what a claim writes under `with:`."""
    function: Callable[..., MeasureResult]
    is_unit: bool
    """True if the measure only converts the unit. A reading by it then counts as another unit, not as another reading."""
    nested: Mapping[str, Nested] = field(default_factory=dict)
    """Name of each parameter that may be the result of another measure -> its annotation, which says which measures are
    allowed."""

    @property
    def about(self) -> str:
        """Docstring of the function."""
        return inspect.getdoc(self.function) or ""


Quantity = Annotated[Any, Nested()]
"""A parameter that a claim writes as a printed number, or as `{measure: NAME, with: {...}}`. In both cases, the
function gets a Fraction."""
Quantities = Annotated[list[Any], Nested(is_list=True)]
"""A parameter that is a list of Quantities."""
Count = Annotated[Any, Nested(("count", "number", "ratio"))]
"""A Quantity that is a count, a plain number or a ratio."""
Counts = Annotated[list[Any], Nested(("count", "number", "ratio"), is_list=True)]
"""A list of Counts."""
Sizes = Annotated[list[Any], Nested(("bytes",), is_list=True)]
"""A list of Quantities in bytes."""


class NotRunError(Exception):
    """Raised by a measure that cannot be computed here. The message names the missing requirement."""


FOLDER = "folder"
"""Key of pydantic's validation context. Its value is the folder of the claim file. Paths in the claim file are relative
to this folder."""


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
    from harness.methods.peft_config import UNREFERENCED
    from harness.methods.spec import methods

    if name not in (there := methods() | UNREFERENCED):
        raise ValueError(f"unknown method `{name}`; {did_you_mean(name, there)}")
    return name


Model = Annotated[str, AfterValidator(_shape)]
"""A parameter that names a model architecture: a preset, or the path of a config.json."""
Method = Annotated[str, AfterValidator(_method)]
"""A parameter that names a Method. If the measure also has a parameter `config`, it must be a config of this Method."""
Config = dict[str, Any]
"""A Method's config, as in a suite."""
Positive = Annotated[int, Field(ge=1)]


def measure(
    dimension: Dimension, *, is_unit: bool = False
) -> Callable[[Callable[..., MeasureResult]], Callable[..., MeasureResult]]:
    """Return a decorator that marks a function as a measure.

    dimension: kind of the measured quantity, e.g. `bytes`. is_unit: see `Measure`.
    """

    def mark(function: Callable[..., MeasureResult]) -> Callable[..., MeasureResult]:
        function.dimension, function.is_unit = dimension, is_unit  # type: ignore[attr-defined]
        return function

    return mark


@cache
def measures() -> Mapping[str, Measure]:
    """Return name -> Measure for all marked functions in the modules of `harness.claims.measures`."""
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
    arguments = create_model(name, __config__=strict, **fields)
    return Measure(name, function.dimension, arguments, function, function.is_unit, nested)
