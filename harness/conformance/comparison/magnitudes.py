"""Magnitudes of drawn inputs: values at which rounding, overflow or a wrong mean shows that normal noise hides."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = {torch.float16: 2.0**7}
"""Factor of large and small inputs in dtypes of few exponents; sums of products must stay finite."""
_LARGE_ELSEWHERE = 2.0**60
_OUTLIER = 2.0**6


def vary(drawn: Tensor, magnitude: str, dtype: torch.dtype) -> Tensor:
    """Return inputs of another magnitude, float64, of the shape of `drawn` (..., D), which is normal noise.

    magnitude: `normal`; `large` (float16: above 64, where a factor of 1024 overflows) and `small`, powers of two away;
    `outlier`, one large feature; `zero-rows`, every second row; `integers`, beyond 2^11,
    which a cast to 16 bits rounds.
    """
    factor = _LARGE.get(dtype, _LARGE_ELSEWHERE)
    if magnitude == "large":
        return drawn * factor
    if magnitude == "small":
        return drawn / factor
    if magnitude == "integers":
        return (drawn * 3000).round()
    varied = drawn.clone()
    if magnitude == "outlier" and varied.numel():
        varied[..., varied.shape[-1] // 2] *= _OUTLIER
    if magnitude == "zero-rows" and varied.dim() > 1:
        varied[..., ::2, :] = 0.0
    return varied
