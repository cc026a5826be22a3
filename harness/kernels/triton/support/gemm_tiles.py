"""Which tile a program of a matrix product has: a small table, chosen from by shape, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from harness.kernels.device import interpreted


@dataclass(frozen=True)
class GemmTile:
    """A program's share: m x n of the output, k of the sum at a time; and how the kernel is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def shallow(self) -> GemmTile:
        """Return it with half the k, and a stage more: for a kernel that holds more operands of a step than two."""
        return replace(self, k=self.k // 2, stages=self.stages + 1)

    def programs(self, M: int, N: int) -> int:
        """Return how many such tiles cover an output of (M, N)."""
        return -(-M // self.m) * -(-N // self.n)

    def constants(self) -> dict[str, int]:
        """Return the constants of a kernel that has such tiles."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


LARGEST = GemmTile(128, 256, 64, warps=8, stages=3)
LARGE = GemmTile(128, 128, 64, warps=8, stages=3)
EXACT = GemmTile(64, 64, 32, warps=8, stages=3)
"""For float32, whose products are on no matrix unit."""
FEW_ROWS = (GemmTile(16, 32, 128, 4, 4), GemmTile(32, 64, 64, 4, 4), GemmTile(64, 64, 64, 4, 4))
_INTERPRETED = GemmTile(128, 128, 128, 4, 1)
"""A program costs the interpreter more than what it multiplies."""


def gemm_tile(M: int, N: int, dtype: torch.dtype, device: torch.device, *, crowded: bool = False) -> GemmTile:
    """Return the tile for an output (M, N). crowded: whether another tile of the output's size passes through
    registers: what multiplies the term, or a second output.

    Not by trials on the card: the same call is to round alike on every one of them, and in every process.
    """
    if interpreted():
        return _INTERPRETED
    if dtype == torch.float32:
        return EXACT
    for tile in FEW_ROWS:
        if tile.m >= M:
            return tile
    # The largest tile reads least, but takes most registers, and few of them leave processors idle.
    if not crowded and LARGEST.programs(M, N) >= 256 and _multiplies_from_shared_memory(device):
        return LARGEST
    return LARGE if LARGE.programs(M, N) >= 64 else FEW_ROWS[-1]


def rank_block(R: int) -> int:
    """Return how much of a rank is multiplied at a time: all of a small one, filled up to what a matrix unit takes."""
    return min(max(16, 1 << (R - 1).bit_length()), 64)


@cache
def _multiplies_from_shared_memory(device: torch.device) -> bool:
    """Return whether this is an H100, a B200 or the like: elsewhere operands take registers, too many for LARGEST."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
