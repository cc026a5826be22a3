"""Formulas for the least numbers of bytes and FLOPs that a call of an Operation needs. This module imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.bench.sizes import BenchSize

BLOCK = 64
"""Number of elements that share one absmax in NF4 and FP4. 64 is the default of bitsandbytes."""
BLOCK8 = 256
"""Number of elements that share one absmax in the 8-bit formats."""


@dataclass(frozen=True)
class Cost:
    """Least work of a call, as two functions of the call's size."""

    bytes: Callable[[BenchSize, int], float]
    """Function (size, bytes per element of the call's dtype) -> number of bytes that the call must move."""
    flops: Callable[[BenchSize], float]
    """Function (size) -> number of floating-point operations."""


@dataclass(frozen=True)
class TimedOperation:
    """An Operation that `bench` times: arguments and least work of a call."""

    case: Callable[[BenchSize], dict[str, Any]]
    """Function (size) -> keyword arguments for the Operation's function `arguments`, which draws the inputs."""
    forward: Cost
    """Least work of the forward pass."""
    backward: Cost | None = None
    """Additional work of the backward pass. None if only the forward pass is timed."""
    per_token: bool = False
    """True if the time of a call depends on the number of tokens."""


def packed_bytes(s: BenchSize) -> float:
    """Return the number of bytes of a weight in 4 bits, including one float32 absmax per block."""
    return s.weights * (0.5 + 4 / BLOCK)


def low_rank(s: BenchSize, rank: int) -> int:
    """Return the number of elements of both low-rank factors, A and B, together."""
    return rank * (s.D + s.E)
