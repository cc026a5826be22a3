"""Limit a timed process to a few cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def available_cores() -> int:
    """Return how many cores this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


@contextmanager
def limit_cores(count: int | None) -> Iterator[list[int]]:
    """Limit this process and its future children to `count` of its cores. Yield the numbers of these cores.

    count: None for all cores. The cores with the highest numbers are used, because the cores with the lowest numbers
    handle most interrupts. macOS cannot do this: all cores stay available, and the yielded list is empty.
    """
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):
        yield []
        return
    cores = sorted(process.cpu_affinity())
    if count is None:
        yield cores
        return
    process.cpu_affinity(cores[-count:])
    try:
        yield cores[-count:]
    finally:
        process.cpu_affinity(cores)
