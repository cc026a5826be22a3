"""Least bytes and FLOPs of a call, and formulas that several Operations share. No torch."""

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
    """size -> the keyword arguments of the Operation's `arguments`."""
    forward: Cost
    """Cost of the call."""
    backward: Cost | None = None
    """Additional cost of a training step; None if nothing is differentiated."""
    per_token: bool = False
    """True if the time depends on the number of tokens."""


def packed_bytes(s: BenchSize) -> float:
    """Return the bytes of the weight in 4 bits with a float32 absmax per block."""
    return s.weights * (0.5 + 4 / BLOCK)


def dense_bytes(s: BenchSize, itemsize: int) -> float:
    """Return the bytes of the dense weight."""
    return itemsize * s.weights


def low_rank(s: BenchSize, rank: int) -> int:
    """Return the number of elements of A and B."""
    return rank * (s.D + s.E)


def linear_case(s: BenchSize, **more: Any) -> dict[str, Any]:
    """Return the case of a linear layer without a bias."""
    return {"shape": [s.E, s.D], "rows": [s.tokens], "bias": False, **more}


def adapted_linear(
    weight: Callable[[BenchSize, int], float],
    *,
    times: int = 1,
    trains: str = "AB",
    norm: bool = False,
    decoded: bool = False,
) -> tuple[Cost, Cost]:
    """Return the costs (forward, backward) of x W^T plus a low-rank product.

    weight: bytes of W. times: the rank as a multiple of LoRA's. trains: `AB`, or the names of trained vectors. norm: whether
    the row norms of W + s B A are needed, by way of W A^T (E x D x R products). decoded: whether each element of W costs one
    more multiplication.
    """

    def forward_flops(s: BenchSize) -> float:
        rank = s.rank * times
        of_norm = 2 * s.weights * rank + 2 * s.weights if norm else 0
        return 2 * s.tokens * (s.weights + low_rank(s, rank)) + of_norm + s.weights * decoded

    def backward_flops(s: BenchSize) -> float:
        # dx = dy W + dS A and dS = dy B; with A and B trained also dA = dS^T x and dB = dy^T S, else two sums.
        low = 2 * s.tokens * low_rank(s, s.rank * times) * (2 if trains == "AB" else 1)
        return 2 * s.tokens * s.weights + low + s.weights * decoded

    def forward_bytes(s: BenchSize, i: int) -> float:
        return weight(s, i) + i * (low_rank(s, s.rank * times) + s.tokens * (s.D + s.E))

    def backward_bytes(s: BenchSize, i: int) -> float:
        written = low_rank(s, s.rank) if trains == "AB" else s.E + s.rank * times
        read = low_rank(s, s.rank * times) + s.tokens * (s.D + s.E)  # A and B, x and dy
        return weight(s, i) + i * (read + written + s.tokens * s.D)

    return Cost(forward_bytes, forward_flops), Cost(backward_bytes, backward_flops)
