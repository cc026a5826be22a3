"""Base classes and units for the models of a run's files. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Joules = Annotated[float, Field(ge=0)]
Scalar = bool | int | float | str
Json = Scalar | None | list[Any] | dict[str, Any]


class FrozenModel(BaseModel):
    """An immutable and strictly typed model. It accepts no unknown keys, no NaN and no infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with changed fields, without the cached properties of this object. update: the new values."""
        copied = super().model_copy(update=update, deep=deep)
        for name in vars(copied).keys() - type(copied).model_fields.keys():
            del copied.__dict__[name]
        return copied


class ExtendedModel(FrozenModel):
    """A model that got more fields after the first Records were published. If such a field has its default, a `cell_id`
    ignores the field.
    """

    later_fields: ClassVar[tuple[str, ...]]
    """Names of the added fields."""

    def later(self) -> dict[str, Scalar]:
        """Return those added fields whose values are not the defaults: name -> value."""
        defaults = type(self).model_fields
        return {n: value for n in self.later_fields if (value := getattr(self, n)) != defaults[n].default}


def mistake(problem: ValidationError | None) -> str:
    """Describe the first validation error of a file, with its location and the number of further errors."""
    found = problem.errors(include_url=False, include_context=False, include_input=False) if problem else []
    if not found:
        return "nothing in it"
    where = ".".join(map(str, found[0]["loc"]))
    more = f", and {len(found) - 1} more mistakes" if len(found) > 1 else ""
    return f"{where}: {found[0]['msg']}{more}" if where else f"{found[0]['msg']}{more}"


def meaning(model: type[BaseModel], field: str) -> str:
    """Return the first sentence of a field's docstring on one line, without its full stop."""
    text = " ".join((model.model_fields[field].description or "").split())
    return re.split(r"(?<!e\.g)\.(?: (?=[A-Z`])|$)", text, maxsplit=1)[0]
