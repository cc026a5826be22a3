"""Least bytes and FLOPs of a call, and formulas shared by several Operations. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.bench.sizes import BenchSize

BLOCK = 64
"""Elements per absmax in NF4 and FP4: the default of bitsandbytes."""
BLOCK8 = 256
"""Elements per absmax in 8 bits."""


@dataclass(frozen=True)
class Cost:
    """Least work of a call, as formulas of its size."""

    bytes: Callable[[BenchSize, int], float]
    """(size, bytes per element of the case's dtype) -> bytes moved."""
    flops: Callable[[BenchSize], float]
    """size -> floating-point operations."""


@dataclass(frozen=True)
class TimedOperation:
    """Arguments and least costs of a timed Operation."""

    case: Callable[[BenchSize], dict[str, Any]]
    """size -> keyword arguments for the Operation's function `arguments`, which draws the inputs."""
    forward: Cost
    """Cost of the call."""
    backward: Cost | None = None
    """Additional cost of the backward pass; None if only the call is timed."""
    per_token: bool = False
    """True if the time depends on the number of tokens."""


def packed_bytes(s: BenchSize) -> float:
    """Return the bytes of the weight in 4 bits with a float32 absmax per block."""
    return s.weights * (0.5 + 4 / BLOCK)


def low_rank(s: BenchSize, rank: int) -> int:
    """Return the number of elements of A and B together."""
    return rank * (s.D + s.E)
