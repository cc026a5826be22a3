"""Parity suites: which cases `check` tries for a Method. One YAML per Method in suites/parity/."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from harness import yaml_lines
from harness.errors import Problem, SuiteError, UsageError
from harness.records import Frozen
from harness.resources import folder

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


class Shape(Frozen):
    """tokens x in x out of one linear layer."""

    tokens: int = Field(ge=1)
    inputs: int = Field(ge=1, alias="in")
    outputs: int = Field(ge=1, alias="out")


class ParitySuite(Frozen):
    """The cases of one Method: every config x shape x dtype x state."""

    method: str
    checks: list[str]
    states: list[Literal["init", "warm"]]
    configs: list[dict[str, Any]]
    shapes: list[Shape]
    dtypes: list[Dtype]

    def cases(self) -> Iterator[tuple[dict[str, Any], Shape, Dtype]]:
        """Yield (config, shape, dtype); states are taken in turn on one subject."""
        yield from itertools.product(self.configs, self.shapes, self.dtypes)


def path_of(method: str) -> Path:
    """Return where a Method's parity suite stands."""
    return folder("suites") / "parity" / f"{method}.yaml"


def load(method: str) -> ParitySuite:
    """Read a Method's parity suite."""
    path = path_of(method)
    if not path.is_file():
        raise UsageError(
            f"no parity suite for {method}", where=str(path), mend="add one: which checks, configs, shapes"
        )
    document = yaml_lines.load(path)
    try:
        return ParitySuite.model_validate(document.data)
    except ValidationError as error:
        raise SuiteError(
            [
                Problem(document.where(*(p for p in e["loc"] if isinstance(p, str | int))), e["msg"])
                for e in error.errors()
            ]
        ) from error
