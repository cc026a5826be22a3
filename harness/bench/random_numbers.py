"""Draw the random numbers of a benchmark.

A GPU draws its own numbers, because drawing gigabytes on a CPU and copying them takes long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a seeded generator of random numbers: on `device` if it is a GPU, otherwise on the CPU."""
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)


def normal(shape: Sequence[int], drawn_by: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of standard normal numbers on `device`. The generator `drawn_by` draws them in float32."""
    return torch.randn(*shape, generator=drawn_by, device=drawn_by.device).to(device, dtype)
