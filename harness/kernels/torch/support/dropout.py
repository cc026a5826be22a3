"""Dropout as a mask of its own, so that a layer need not keep the input that was dropped as well as the input."""

from __future__ import annotations

import torch
from torch import Tensor

_COARSE = 1 / 256
"""Nearer than this to 0 or 1, 16 bits of randomness would not say a probability well enough."""


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which features of x are kept: a tensor of zeros and ones like x, and the probability of a one.

    What is kept is to be divided by that probability, which is 1 - p rounded to a multiple of 2^-16 (2^-32 if p is near 0 or
    1); where nothing is kept it is given as 1. torch's own draw on a CPU takes a double from the generator for every element
    and is most of what dropout costs there; here a draw of 64 bits decides four, or two if p is near 0 or 1.
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
