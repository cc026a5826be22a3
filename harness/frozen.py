"""What every file of a run is made of: models that nothing changes, in base units. No torch here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Joules = Annotated[float, Field(ge=0)]
Scalar = bool | int | float | str
Json = Scalar | None | list[Any] | dict[str, Any]


class Frozen(BaseModel):
    """Immutable, strict, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
