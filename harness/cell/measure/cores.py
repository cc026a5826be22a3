"""Holding what is timed to few cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def allowed() -> int:
    """Return how many cores this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


@contextmanager
def held_to(count: int | None) -> Iterator[list[int]]:
    """Let this process, and those that it starts, use only so many of its cores; yield their numbers.

    Those of the highest numbers: interrupts mostly go to the lowest. count: None for all. Yields nothing, and holds nothing,
    where the system knows no such thing (macOS).
    """
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):
        yield []
        return
    allowed = sorted(process.cpu_affinity())
    if count is None:
        yield allowed
        return
    process.cpu_affinity(allowed[-count:])
    try:
        yield allowed[-count:]
    finally:
        process.cpu_affinity(allowed)
