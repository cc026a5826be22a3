"""Choose the tile of a matrix product that each program computes, by shape, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from harness.kernels.device import interpreted


@dataclass(frozen=True)
class GemmTile:
    """The part of a product that one program computes, and compiler options."""

    m: int
    """Rows of the output."""
    n: int
    """Columns of the output."""
    k: int
    """Terms of the sum per iteration."""
    warps: int
    stages: int

    def shallow(self) -> GemmTile:
        """Return the tile with half the k and one more stage, for a kernel with more than two operands per iteration."""
        return replace(self, k=self.k // 2, stages=self.stages + 1)

    def programs(self, M: int, N: int) -> int:
        """Return the number of tiles that cover an output (M, N)."""
        return -(-M // self.m) * -(-N // self.n)

    def constants(self) -> dict[str, int]:
        """Return the tile as constants of a kernel."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


LARGEST = GemmTile(128, 256, 64, warps=8, stages=3)
LARGE = GemmTile(128, 128, 64, warps=8, stages=3)
EXACT = GemmTile(64, 64, 32, warps=8, stages=3)
"""Tile for float32, which no matrix unit multiplies."""
FEW_ROWS = (GemmTile(16, 32, 128, 4, 4), GemmTile(32, 64, 64, 4, 4), GemmTile(64, 64, 64, 4, 4))
_INTERPRETED = GemmTile(128, 128, 128, 4, 1)
"""Tile for the interpreter: large, since a program costs the interpreter more than its products."""


def gemm_tile(M: int, N: int, dtype: torch.dtype, device: torch.device, *, crowded: bool = False) -> GemmTile:
    """Return the tile for an output (M, N).

    crowded: whether registers hold another tile of the output's size, a factor or a second output. The tile is not
    autotuned, so that a call rounds equally on every GPU of an architecture and in every process.
    """
    if interpreted():
        return _INTERPRETED
    if dtype == torch.float32:
        return EXACT
    for tile in FEW_ROWS:
        if tile.m >= M:
            return tile
    # The largest tile reads least, but takes most registers, and too few tiles leave processors idle.
    if not crowded and LARGEST.programs(M, N) >= 256 and _multiplies_from_shared_memory(device):
        return LARGEST
    return LARGE if LARGE.programs(M, N) >= 64 else FEW_ROWS[-1]


def rank_block(R: int) -> int:
    """Return the ranks per iteration: R rounded up to a power of two, from 16 (for matrix instructions) to 64."""
    return min(max(16, 1 << (R - 1).bit_length()), 64)


@cache
def _multiplies_from_shared_memory(device: torch.device) -> bool:
    """Return whether operands stay in shared memory, as on H100 and B200; elsewhere LARGEST takes too many registers."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
