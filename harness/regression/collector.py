"""Pause of Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Pause Python's garbage collector in this context, for code that creates millions of objects without cycles.

    Without the pause, the collector would scan these objects again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()  # the next collection must not scan these objects
            gc.enable()
