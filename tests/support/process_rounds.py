"""Artificial rounds of process runs, in seconds."""

from __future__ import annotations


def rounds(seconds: float, spread: float = 0.01) -> list[float]:
    """Return twenty rounds of a process run with the median `seconds`."""
    return [seconds * (1 + spread * (i - 9.5) / 10) for i in range(20)]


def runs(*seconds: float) -> list[list[float]]:
    return [rounds(one) for one in seconds]


FIVE = runs(1.00e-3, 1.01e-3, 0.99e-3, 1.02e-3, 0.995e-3)
