"""Change the magnitude of random inputs.

Some magnitudes reveal rounding errors, an overflow or a wrong mean that normal noise would hide.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = {torch.float16: 2.0**7}
"""dtype -> factor of `large` inputs, and divisor of `small` inputs. Only float16 needs its own factor, which is so
small that sums of products stay finite."""
_LARGE_ELSEWHERE = 2.0**60
_HUGE = {torch.float16: 2.0**10}
_HUGE_ELSEWHERE = 2.0**110
_TINY = {torch.float16: 2.0**-18, torch.bfloat16: 2.0**-118}
_TINY_ELSEWHERE = 2.0**-129
"""Factor of `tiny` inputs in a dtype without an entry in `_TINY`. In float32 it makes normal noise subnormal, i.e.
smaller than the smallest number with full precision. In bfloat16 most numbers stay just above that, because a CPU's matrix
instructions (AMX, AVX512-BF16) read subnormal ones as zeros. In float64 the same factor keeps full precision."""
_OUTLIER = 2.0**6


def vary(drawn: Tensor, magnitude: str, dtype: torch.dtype) -> Tensor:
    """Return inputs of another magnitude, with the shape and dtype of the normal noise `drawn` (..., D).

    dtype: the dtype to which the inputs will be cast. magnitude: `normal` changes nothing. `large` multiplies by a
    power of two, and `small` divides by it. In float16 this power is small enough not to overflow. `outlier` makes one
    feature large. `zero-rows` sets every second row to zero. `huge` multiplies so much that squares overflow, and `tiny`
    gives subnormal numbers, or nearly so in bfloat16. float64 gets the factors of float32, so neither happens there.
    `constant` is 1 everywhere. `positive` removes the signs.
    """
    factor = _LARGE.get(dtype, _LARGE_ELSEWHERE)
    if magnitude == "large":
        return drawn * factor
    if magnitude == "small":
        return drawn / factor
    if magnitude == "huge":
        return drawn * _HUGE.get(dtype, _HUGE_ELSEWHERE)
    if magnitude == "tiny":
        return drawn * _TINY.get(dtype, _TINY_ELSEWHERE)
    if magnitude == "constant":
        return torch.ones_like(drawn)
    if magnitude == "positive":
        return drawn.abs()
    varied = drawn.clone()
    if magnitude == "outlier" and varied.numel():
        varied[..., varied.shape[-1] // 2] *= _OUTLIER
    if magnitude == "zero-rows" and varied.dim() > 1:
        varied[..., ::2, :] = 0.0
    return varied
