"""Dropout by a separate mask. A layer saves its input and the mask, and need not save the dropped input."""

from __future__ import annotations

import torch
from torch import Tensor

_COARSE = 1 / 256
"""Limit for 16 random bits per element. A probability closer to 0 or 1 than this needs 32 bits."""


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Return (mask, keep): a random mask of zeros and ones in the shape of x, and 1 - p.

    p: probability of a zero. The caller divides the kept features by `keep`, which is 1 if p is 1. On a CPU, p is
    rounded to a multiple of 2^-16, or of 2^-32 if p is near 0 or 1. One draw of 64 random bits decides four elements,
    or two if p is near 0 or 1. torch would draw a double per element, which is most of the cost of dropout.
    """
    if p == 1:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), 1.0
    if x.device.type != "cpu":
        return torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - p), 1 - p
    lane, bits = (torch.int16, 16) if _COARSE <= p <= 1 - _COARSE else (torch.int32, 32)
    dropped = min(round(p * 2**bits), 2**bits - 1)
    words = torch.empty(-(-x.numel() * bits // 64), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    lanes = words.view(lane)[: x.numel()]
    return (lanes >= dropped - 2 ** (bits - 1)).to(x.dtype).view(x.shape), 1 - p
