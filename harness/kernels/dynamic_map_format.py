"""The 256 values of the dynamic 8-bit map (arXiv:2110.02861, section 2), shared by the torch and the Triton kernels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from harness.kernels.real_tensors import real_tensors


@cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """Return the 256 values of the map in ascending order, float32. The result is cached: do not write to it.

    The interval from 10^-7 to 1 is divided into seven decades, i = 0 to 6. Decade i runs from 10^(i - 7) to 10^(i - 6),
    and is divided into 2^i equal cells if `signed`, else into 2^(i + 1). The values are 0, 1, the centres of all cells
    and, if `signed`, the negatives of the centres. The smallest value is -0.993 if `signed`, else 0. The result does
    not depend on torch's default dtype, device and mode.
    """
    with real_tensors():
        sizes = [2 ** (i + (not signed)) for i in range(7)]
        edges = [torch.linspace(0.1, 1, size + 1, dtype=torch.float32, device="cpu") for size in sizes]
        above = torch.cat([10.0 ** (i - 6) * ((e[:-1] + e[1:]) / 2) for i, e in enumerate(edges)])
        zero, one = torch.tensor([[0.0], [1.0]], dtype=torch.float32, device="cpu")
        return torch.cat([-above.flip(0) if signed else above[:0], zero, above, one]).to(device)
