"""Choose the size of the tile of a matrix product that each program computes, by shape, dtype and GPU architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from harness.kernels.device import interpreted


@dataclass(frozen=True)
class GemmTile:
    """The size of the part of a matrix product that one program computes, with compiler options (warps, stages)."""

    m: int
    """Number of rows of the output."""
    n: int
    """Number of columns of the output."""
    k: int
    """Number of terms of each sum that one iteration adds."""
    warps: int
    stages: int

    def shallow(self) -> GemmTile:
        """Return a tile with half of this tile's k and one more pipeline stage.

        A kernel with more than two operands per iteration needs such a tile.
        """
        return replace(self, k=self.k // 2, stages=self.stages + 1)

    def programs(self, M: int, N: int) -> int:
        """Return the number of tiles that cover an output (M, N)."""
        return -(-M // self.m) * -(-N // self.n)

    def constants(self) -> dict[str, int]:
        """Return the constexpr arguments BLOCK_M, BLOCK_N and BLOCK_K of a kernel."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


LARGEST = GemmTile(128, 256, 64, warps=8, stages=3)
LARGE = GemmTile(128, 128, 64, warps=8, stages=3)
EXACT = GemmTile(64, 64, 32, warps=8, stages=3)
"""Tile for float32, which is multiplied without matrix instructions."""
FEW_ROWS = (GemmTile(16, 32, 128, 4, 4), GemmTile(32, 64, 64, 4, 4), GemmTile(64, 64, 64, 4, 4))
_INTERPRETED = GemmTile(128, 128, 128, 4, 1)
"""Tile for Triton's interpreter. It is large, because starting a program takes longer than its computation."""


def _variants(k: int, *sizes: tuple[int, int, int, int]) -> tuple[GemmTile, ...]:
    """Return tiles with this k. sizes: rows, columns, warps and stages of each tile."""
    return tuple(GemmTile(m, n, k, warps, stages) for m, n, warps, stages in sizes)


CANDIDATES: dict[GemmTile, tuple[GemmTile, ...]] = {
    FEW_ROWS[0]: _variants(128, (16, 32, 4, 5), (16, 64, 4, 4), (16, 128, 4, 3)),
    FEW_ROWS[1]: _variants(64, (32, 64, 4, 6), (32, 32, 4, 6), (32, 128, 4, 4)),
    FEW_ROWS[2]: _variants(64, (64, 64, 4, 6), (64, 32, 4, 6), (64, 128, 4, 4)),
    LARGE: _variants(64, (128, 128, 8, 4), (64, 128, 4, 4), (128, 64, 4, 4), (64, 256, 8, 3)),
    LARGEST: _variants(64, (128, 256, 8, 4), (256, 128, 8, 3), (128, 128, 8, 4)),
    _INTERPRETED: _variants(128, (64, 128, 4, 1)),
}
"""Default tile, which `gemm_tile` returns -> the tiles that `peft-harness bench --crossovers` tries instead.

The candidates have the k of the default. If the default has at least 64 rows, so have they; otherwise they have fewer
than 64. On an H100, the limit of 64 rows decides the matrix instruction. Every element of the output is therefore the
same sum in the same order, and a tuned tile changes no bit of a result. Tiles for float32, and tiles that `gemm_tile`
returns for `crowded=True`, are never replaced.
"""


def gemm_tile(M: int, N: int, dtype: torch.dtype, device: torch.device, *, crowded: bool = False) -> GemmTile:
    """Return the tile for an output (M, N). The tile is the same on every GPU of an architecture.

    crowded: True if registers also hold a factor or a second output with a tile of the same size. If `crowded` is
    False, `tuned_tiles.tuned` may replace the returned tile by one of its `CANDIDATES`.
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
    """Return how many ranks one iteration handles: R rounded up to a power of two, but at least 16 and at most 64.

    Matrix instructions need at least 16.
    """
    return min(max(16, 1 << (R - 1).bit_length()), 64)


@cache
def _multiplies_from_shared_memory(device: torch.device) -> bool:
    """Return whether matrix instructions read operands from shared memory, as on H100 and B200.

    On other GPUs, operands take registers, and the tile LARGEST takes too many registers.
    """
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
