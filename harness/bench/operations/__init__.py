"""The Operations that `bench` times, with the arguments and the least work of a call. This module imports no torch.

Every module of this package has a dict `TIMED`: name of an Operation -> `TimedOperation`. A new module need not be
listed anywhere. Bytes: every input is read once and every output is written once, in its own dtype. FLOPs: each
multiplication and each addition counts as one, and a comparison as none.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from harness.bench.costs import TimedOperation


@cache
def every() -> dict[str, TimedOperation]:
    """Return a dict: name of each timed Operation -> its `TimedOperation`.

    Raises ValueError if two modules declare the same name.
    """
    found: dict[str, TimedOperation] = {}
    for module in pkgutil.iter_modules(__path__):
        timed = importlib.import_module(f"{__name__}.{module.name}").TIMED
        if twice := found.keys() & timed.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: timed by {__name__}.{module.name} and by another module")
        found |= timed
    return found
