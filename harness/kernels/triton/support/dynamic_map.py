"""The dynamic 8-bit map (arXiv:2110.02861, section 2) for kernels: its tables, and the nearest code in two look-ups.

The sign, the exponent and the first seven bits of the fraction of a float32 in [-1, 1] select a bucket. A bucket
contains at most one midpoint between neighbouring values of the map. A table gives the number of midpoints below the
bucket. One comparison with the next midpoint then decides the code. The result is exact. A binary search would take
eight dependent look-ups.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.dynamic_map_format import dynamic_map

_SHIFT = tl.constexpr(16)  # leaves seven bits of the fraction
_FIRST = tl.constexpr((127 - 23) << 7)  # the bucket of 2^-23, below which there is no midpoint
_BUCKETS = tl.constexpr((23 << 7) + 1)  # buckets from _FIRST to that of 1


def midpoints(signed: bool) -> Tensor:
    """Return the 255 midpoints between neighbouring values of the map, followed by infinity: float32 (256,)."""
    ascending = dynamic_map(torch.device("cpu"), signed)
    return torch.cat([(ascending[:-1] + ascending[1:]) / 2, torch.tensor([torch.inf], dtype=torch.float32)])


def buckets(signed: bool) -> Tensor:
    """Return the number of midpoints below each bucket, uint8. The buckets of negative numbers come last."""
    edges = torch.arange(_FIRST.value, _FIRST.value + _BUCKETS.value + 1, dtype=torch.int32).bitwise_left_shift(
        _SHIFT.value
    )
    magnitudes = edges.view(torch.float32)
    inner = midpoints(signed)[:-1]
    magnitudes[0] = 0.0  # the first bucket begins at 0
    positive = torch.bucketize(magnitudes[:-1], inner)
    if not signed:
        return positive.to(torch.uint8)
    # A negative bucket is (-upper, -lower], so that a midpoint equal to -upper is below the bucket, too.
    negative = torch.bucketize(-magnitudes[1:], inner, right=True)
    return torch.cat([positive, negative]).to(torch.uint8)


@lru_cache(maxsize=32)
def tables(device: torch.device, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values, the midpoints and the numbers of `buckets` of the signed or unsigned map, on this device.

    The result is cached.
    """
    return dynamic_map(device, signed), midpoints(signed).to(device), buckets(signed).to(device)


@triton.jit
def nearest(x, midpoints_ptr, buckets_ptr, signed: tl.constexpr):
    """Return the code (int32) of the map's value nearest to x. Ties go to the lower value.

    x: float32 in [-1, 1], or in [0, 1] if not `signed`. A NaN gets the first or the last code.
    """
    bits = x.to(tl.int32, bitcast=True)
    bucket = ((bits & 0x7FFFFFFF) >> _SHIFT) - _FIRST
    bucket = tl.minimum(tl.maximum(bucket, 0), _BUCKETS - 1)
    if signed:
        bucket = tl.where(bits < 0, bucket + _BUCKETS, bucket)
    below = tl.load(buckets_ptr + bucket).to(tl.int32)
    return below + (x > tl.load(midpoints_ptr + below)).to(tl.int32)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """Return the largest |x| along an axis. A NaN is larger than infinity, because numbers are compared as bits."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def relative(x, absmax):
    """Return x / absmax, or 0 in a block of zeros.

    The quotient is correctly rounded, because the code depends on its last bit.
    """
    return tl.where(absmax == 0, 0.0, tl.div_rn(x, tl.where(absmax == 0, 1.0, absmax)))


@triton.jit
def nearly_relative(x, absmax):
    """Return x / absmax within two units in the last place, or 0 in a block of zeros.

    This takes a tenth of the work of `relative`. A small absmax and its x are first scaled up, because the reciprocal
    of a subnormal number overflows.
    """
    boost = tl.where(absmax < 2.0**-60, 2.0**64, 1.0)
    reciprocal = tl.where(absmax == 0, 0.0, tl.div_rn(1.0, tl.where(absmax == 0, 1.0, absmax * boost)))
    return (x * boost) * reciprocal
