"""Dropout as a separate mask, so that a layer need not save the dropped input in addition to the input."""

from __future__ import annotations

import torch
from torch import Tensor

_COARSE = 1 / 256
"""16 random bits are too coarse for a probability that is nearer to 0 or 1 than this."""


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Return (mask, keep): a drawn dropout mask of zeros and ones like x, and the probability of a one.

    `keep` is 1 if p is 1, else 1 - p, which on a CPU is rounded to a multiple of 2^-16 (2^-32 if p is near 0 or 1). The
    caller divides the remaining features by `keep`. On a CPU torch draws a double per element, which is most of the
    cost of dropout; here one draw of 64 bits decides four elements, or two if p is near 0 or 1.
    """
    if p == 1:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), 1.0
    if x.device.type != "cpu":
        return torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - p), 1 - p
    lane, bits = (torch.int16, 16) if _COARSE <= p <= 1 - _COARSE else (torch.int32, 32)
    dropped = min(round(p * 2**bits), 2**bits - 1)
    words = torch.empty(-(-x.numel() * bits // 64), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    lanes = words.view(lane)[: x.numel()]
    return (lanes >= dropped - 2 ** (bits - 1)).to(x.dtype).view(x.shape), 1 - dropped / 2**bits
