"""`reference`: every Method in the folder `reference/` and every Operation's reference, offered through the common door."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import Any

from harness.methods.registry import Implementation, implements
from harness.methods.spec import methods

DTYPES = ("float64", "float32", "bfloat16", "float16")
OPERATIONS = "harness.conformance.operations"


def implementations() -> list[Implementation]:
    """Return one Implementation per Method and per Operation; torch is imported when one is first called."""
    found = find_spec(OPERATIONS)
    folders = found.submodule_search_locations if found is not None else None
    operations = [module.name for module in pkgutil.iter_modules(folders)] if folders else []
    return [*map(_method, methods()), *map(_operation, operations)]


def _method(name: str) -> Implementation:
    @implements(name, name="reference", dtypes=DTYPES)
    def attach(model: Any, config: Any, generator: Any) -> Any:
        return importlib.import_module(f"reference.{name}").attach(model, config, generator)

    return attach


def _operation(name: str) -> Implementation:
    @implements(name, name="reference", kind="operation", dtypes=DTYPES)
    def call(**arguments: Any) -> Any:
        return importlib.import_module(f"{OPERATIONS}.{name}").OPERATION.reference(**arguments)

    return call
