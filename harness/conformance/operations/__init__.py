"""The Operations: kernel-level functions, each with its arguments, its reference and the judgement of its outputs.

One file each, named like the Operation, with `OPERATION` in it. An implementation of kind `operation` is a function of
the same arguments that returns the outputs in order: one tensor or a tuple.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from harness.conformance.operation import Operation


@cache
def every() -> dict[str, Operation]:
    """Map names to Operations."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").OPERATION for name in names}
