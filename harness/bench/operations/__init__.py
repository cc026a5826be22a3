"""The Operations that `bench` times: how their arguments are drawn, and their least bytes and FLOPs. No torch.

Every module of this package may have a dict `TIMED` that maps names of Operations to `TimedOperation`; nothing else lists
them. The bytes of a call are those of every input, read once, and of every output, written once, in its own dtype. A
multiplication and an addition are two FLOPs, a comparison is none.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from harness.bench.costs import TimedOperation


@cache
def every() -> dict[str, TimedOperation]:
    """Map the name of each timed Operation to its `TimedOperation`. Raises ValueError if two modules declare one."""
    found: dict[str, TimedOperation] = {}
    for module in pkgutil.iter_modules(__path__):
        timed = importlib.import_module(f"{__name__}.{module.name}").TIMED
        if twice := found.keys() & timed.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: timed by {__name__}.{module.name} and by another module")
        found |= timed
    return found
