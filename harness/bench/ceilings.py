"""Measure the highest rates of the machine: bytes per second of a copy and a read, and FLOP/s of matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from harness.bench import random_numbers
from harness.bench.results import Ceilings
from harness.bench.timing import Clock, Run

REPEATS = 5
"""Number of samples per rate. Only the fastest sample is used."""
WARM_S = 0.5
"""Seconds of load on a GPU before the samples of a rate. Meanwhile the GPU raises its clock frequencies."""
COPIED_B = {"cpu": 2**28, "cuda": 2**30}
"""Device -> number of bytes to copy. It is more than any cache holds."""
SIDE = {"cpu": 1536, "cuda": 8192}
"""Device -> number of rows, and also of columns, of the matrices to multiply."""


def measure(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Measure the copy rate and the rate of matrix products `REPEATS` times each, and return the best of each.

    dtype: dtype of the multiplied matrices.
    """
    return Ceilings(copy_B_per_s=_copy(clock), gemm_FLOP_per_s=_product(clock, dtype))


def of_card(clock: Clock) -> Iterator[tuple[str, float, str]]:
    """Yield (name, value, unit) for each rate: a copy, a read, and a matrix product in each dtype."""
    yield "copy", _copy(clock), "B/s"
    yield "read", _read(clock), "B/s"
    halves = [torch.float16] if clock.on_gpu else []  # a CPU without instructions for it takes minutes
    for dtype in (torch.bfloat16, *halves, torch.float32):
        yield f"{str(dtype).removeprefix('torch.')} product", _product(clock, dtype), "FLOP/s"
    if clock.on_gpu:  # last, because the setting holds for the rest of the process
        torch.set_float32_matmul_precision("high")
        yield "float32 product by TF32", _product(clock, torch.float32), "FLOP/s"


def _read(clock: Clock) -> float:
    source = torch.ones(COPIED_B[clock.device.type] // 4, dtype=torch.float32, device=clock.device)
    return 4 * source.numel() / _best(clock, source.sum)


def _copy(clock: Clock) -> float:
    source = torch.ones(COPIED_B[clock.device.type], dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(clock, lambda: target.copy_(source))


def _product(clock: Clock, dtype: torch.dtype) -> float:
    generator, side = random_numbers.generator(clock.device, 0), SIDE[clock.device.type]
    a, b = (random_numbers.normal((side, side), generator, clock.device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(clock, lambda: torch.mm(a, b, out=out))


def _best(clock: Clock, run: Run) -> float:
    clock.sample(run)
    clock.warm_up(run, WARM_S)
    return min(clock.sample(run) for _ in range(REPEATS))
