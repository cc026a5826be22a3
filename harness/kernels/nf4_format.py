"""Levels of NF4 and layout of packed weights (arXiv:2305.14314), shared by the torch and the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from statistics import NormalDist

import torch
from torch import Tensor

from harness.kernels.real_tensors import real_tensors

BLOCK2 = 256
"""Number of absmax values per block of double quantisation."""
ZERO = 7
"""Code of the value 0. An odd number of codes is padded with this code to whole bytes."""


@cache
def levels() -> Tensor:
    """Return the 16 levels of NF4, ascending from -1 to 1, float32 (16,), on the CPU.

    The result is cached: do not write to it. The levels are zero, eight positive quantiles of the normal distribution,
    and the negatives of seven others. All are divided by the largest. The probabilities of the eight, and those of the
    seven, are evenly spaced in float32 from 0.9677083 = 1 - (1/30 + 1/32) / 2 down to 1/2, without 1/2.
    """

    def upper(count: int) -> list[float]:
        grid = torch.linspace(0.9677083, 0.5, count + 1, dtype=torch.float32, device="cpu")
        return [NormalDist().inv_cdf(p) for p in grid[:count].tolist()]

    with real_tensors():
        values = torch.tensor([-q for q in upper(7)] + [0.0, *reversed(upper(8))], dtype=torch.float32, device="cpu")
        return values / values.max()


def check_sizes(packed: Tensor, constants: Tensor, block: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless `packed` and `constants` fit a weight of this shape.

    `packed` must have one byte per two elements, and `constants` one number per block of `block` elements.
    """
    count = prod(shape)
    if block < 1 or packed.numel() != -(-count // 2) or constants.numel() != -(-count // block):
        raise ValueError(
            f"shape {tuple(shape)} in blocks of {block} needs {-(-count // 2)} bytes and {-(-count // max(block, 1))} "
            f"constants, got {packed.numel()} and {constants.numel()}"
        )


def check_second_sizes(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> None:
    """Raise ValueError unless `absmax2` has one number per `block` codes, and `offset` is one number."""
    if block < 1 or absmax2.numel() != -(-codes.numel() // block) or offset.numel() != 1:
        raise ValueError(
            f"{codes.numel()} codes in blocks of {block} need {-(-codes.numel() // max(block, 1))} constants and 1 offset, "
            f"got {absmax2.numel()} and {offset.numel()}"
        )
