"""What the machine reaches, measured beside what is timed: the rate of a copy, and of a matrix product in each dtype."""

from __future__ import annotations

import torch

from harness.bench.results import Ceilings
from harness.bench.timing import Clock, Run

REPEATS = 5
COPIED_B = {"cpu": 2**28, "cuda": 2**30}
"""More than any cache holds."""
SIDE = {"cpu": 1536, "cuda": 8192}


def measure(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Return the best of a few copies and of a few products of square matrices of `dtype`."""
    return Ceilings(copy_B_per_s=_copy(clock), gemm_FLOP_per_s=_product(clock, dtype))


def _copy(clock: Clock) -> float:
    here = torch.ones(COPIED_B[clock.device.type], dtype=torch.uint8, device=clock.device)
    there = torch.empty_like(here)
    return 2 * here.numel() / _best(clock, lambda: there.copy_(here))


def _product(clock: Clock, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    side = SIDE[clock.device.type]
    a, b = (torch.randn(side, side, generator=generator).to(clock.device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(clock, lambda: torch.mm(a, b, out=out))


def _best(clock: Clock, run: Run) -> float:
    clock.sample(run)
    return min(clock.sample(run) for _ in range(REPEATS))
