"""The Operations that `bench` times: how their arguments are drawn, and their least bytes and FLOPs. No torch.

Every module of this package has a dict `TIMED` that maps names of Operations to `TimedOperation`; nothing else lists
them. Bytes: every input read once and every output written once, in its own dtype. FLOPs: a multiplication and an addition
are two, a comparison is none.
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
