"""NF4's 16 levels for kernels: as a tree of selections, as a table in memory, and as midpoints between levels."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.nf4_format import ZERO as ZERO_CODE
from harness.kernels.nf4_format import levels

_VALUES = levels()
ZERO = tl.constexpr(ZERO_CODE)
_LEVEL = tl.constexpr(tuple(_VALUES.tolist()))
_MIDPOINT = tl.constexpr(tuple(((_VALUES[:-1] + _VALUES[1:]) / 2).tolist()))


@cache
def table(device: torch.device) -> Tensor:
    """Return the levels, ascending, float32 (16,), on this device. The result is cached: do not write to it."""
    return _VALUES.to(device)


@triton.jit
def level_by_selection(code):
    """Return the level of each 4-bit `code` by selecting among constants.

    In a loop, Triton would pipeline the loads from a table. A selection needs no loads.
    """
    bit0, bit1, bit2, bit3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    a0, a1 = tl.where(bit0, _LEVEL[1], _LEVEL[0]), tl.where(bit0, _LEVEL[3], _LEVEL[2])
    a2, a3 = tl.where(bit0, _LEVEL[5], _LEVEL[4]), tl.where(bit0, _LEVEL[7], _LEVEL[6])
    a4, a5 = tl.where(bit0, _LEVEL[9], _LEVEL[8]), tl.where(bit0, _LEVEL[11], _LEVEL[10])
    a6, a7 = tl.where(bit0, _LEVEL[13], _LEVEL[12]), tl.where(bit0, _LEVEL[15], _LEVEL[14])
    b0, b1 = tl.where(bit1, a1, a0), tl.where(bit1, a3, a2)
    b2, b3 = tl.where(bit1, a5, a4), tl.where(bit1, a7, a6)
    return tl.where(bit3, tl.where(bit2, b3, b2), tl.where(bit2, b1, b0))


@triton.jit
def nearest_code(scaled):
    """Return the code (int32) of the level nearest to each number of `scaled`, which is in [-1, 1].

    Ties go to the lower level. A NaN gets the code 15.
    """
    # A binary search by "not (scaled <= midpoint)", which is true for a NaN, unlike "scaled > midpoint".
    bit3 = (scaled <= _MIDPOINT[7]) == 0
    bit2 = (scaled <= tl.where(bit3, _MIDPOINT[11], _MIDPOINT[3])) == 0
    below, above = tl.where(bit2, _MIDPOINT[5], _MIDPOINT[1]), tl.where(bit2, _MIDPOINT[13], _MIDPOINT[9])
    bit1 = (scaled <= tl.where(bit3, above, below)) == 0
    a0, a1 = tl.where(bit1, _MIDPOINT[2], _MIDPOINT[0]), tl.where(bit1, _MIDPOINT[6], _MIDPOINT[4])
    a2, a3 = tl.where(bit1, _MIDPOINT[10], _MIDPOINT[8]), tl.where(bit1, _MIDPOINT[14], _MIDPOINT[12])
    below, above = tl.where(bit2, a1, a0), tl.where(bit2, a3, a2)
    bit0 = (scaled <= tl.where(bit3, above, below)) == 0
    return tl.where(bit3, 8, 0) | tl.where(bit2, 4, 0) | tl.where(bit1, 2, 0) | tl.where(bit0, 1, 0)
