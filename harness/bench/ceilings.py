"""Measure two rates of the machine: bytes per second of a copy, and FLOP/s of a matrix product."""

from __future__ import annotations

import torch

from harness.bench.results import Ceilings
from harness.bench.timing import Clock, Run

REPEATS = 5
"""Number of samples per rate. The fastest sample counts."""
COPIED_B = {"cpu": 2**28, "cuda": 2**30}
"""Device -> number of bytes to copy. It is more than any cache holds."""
SIDE = {"cpu": 1536, "cuda": 8192}
"""Device -> number of rows, and of columns, of the matrices to multiply."""


def measure(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Measure the copy rate and the rate of matrix products `REPEATS` times each, and return the best of each.

    dtype: dtype of the multiplied matrices.
    """
    return Ceilings(copy_B_per_s=_copy(clock), gemm_FLOP_per_s=_product(clock, dtype))


def _copy(clock: Clock) -> float:
    source = torch.ones(COPIED_B[clock.device.type], dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(clock, lambda: target.copy_(source))


def _product(clock: Clock, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    side = SIDE[clock.device.type]
    a, b = (torch.randn(side, side, generator=generator).to(clock.device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(clock, lambda: torch.mm(a, b, out=out))


def _best(clock: Clock, run: Run) -> float:
    clock.sample(run)
    return min(clock.sample(run) for _ in range(REPEATS))
