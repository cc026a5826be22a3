"""NF4's levels and the layout of packed weights (arXiv:2305.14314), shared by the torch and the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK2 = 256
"""Constants that share one constant of double quantisation."""
ZERO = 7
"""The code of 0, which also fills up an odd length."""


@cache
def levels() -> Tensor:
    """Return the 16 levels, ascending from -1 to 1, float32, on the CPU: made once, and never to be written to.

    Quantiles of the normal distribution: eight above zero and seven below, at probabilities evenly spaced in float32 from
    0.9677083, which is 1 - (1/30 + 1/32) / 2, down to 1/2. Zero is a level of its own.
    """

    def upper(count: int) -> list[float]:
        grid = torch.linspace(0.9677083, 0.5, count + 1, dtype=torch.float32, device="cpu")
        return [NormalDist().inv_cdf(p) for p in grid[:count].tolist()]

    with torch.inference_mode(False):
        values = torch.tensor([-q for q in upper(7)] + [0.0, *reversed(upper(8))], dtype=torch.float32, device="cpu")
        return values / values.max()


def check_sizes(packed: Tensor, constants: Tensor, block: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless these are the bytes of a tensor of `shape` and one constant for each of its blocks."""
    count = prod(shape)
    if block < 1 or packed.numel() != -(-count // 2) or constants.numel() != -(-count // block):
        raise ValueError(
            f"{tuple(shape)} in blocks of {block} takes {-(-count // 2)} bytes and {-(-count // max(block, 1))} constants, "
            f"got {packed.numel()} and {constants.numel()}"
        )


def check_second_sizes(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> None:
    """Raise ValueError unless absmax2 has one constant for each block of `codes`, and offset is one number."""
    if block < 1 or absmax2.numel() != -(-codes.numel() // block) or offset.numel() != 1:
        raise ValueError(
            f"{codes.numel()} codes in blocks of {block} do not go with {absmax2.numel()} constants and "
            f"{offset.numel()} offsets; they take {-(-codes.numel() // max(block, 1))} and 1"
        )
