"""The Operations: kernel-level functions, each with its arguments, its reference and the judgement of its outputs.

Each Operation has a file named like it, which defines `OPERATION`. An implementation of kind `operation` is a function
that takes the same arguments and returns the outputs in order, as one tensor or a tuple.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from harness.conformance.operation import Operation


@cache
def every() -> dict[str, Operation]:
    """Return all Operations by name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").OPERATION for name in names}
