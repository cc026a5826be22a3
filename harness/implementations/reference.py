"""`reference`: every module of the folder `reference/` that defines a Method, offered through the common door."""

from __future__ import annotations

import importlib
from typing import Any

from harness.methods import methods
from harness.registry import Implementation, implements


def implementations() -> list[Implementation]:
    """Return one Implementation per Method found in `reference/`; torch is imported when one is first called."""
    return [_wrap(name) for name in methods()]


def _wrap(name: str) -> Implementation:
    @implements(name, name="reference", dtypes=("float64", "float32", "bfloat16", "float16"))
    def attach(model: Any, config: Any, generator: Any) -> Any:
        return importlib.import_module(f"reference.{name}").attach(model, config, generator)

    return attach
