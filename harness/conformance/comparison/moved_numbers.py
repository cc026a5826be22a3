"""Move numbers as rounding may move them, so that a reference gives other plausible results.

A plausible result is one that a correct program may compute.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.conformance.comparison.distances import Distance
from harness.conformance.tolerance_constants import EPSILON, PROPORTIONAL, ROUNDED_ULPS


def perturbed(value: Tensor, dtype: str, generator: torch.Generator, ulps: float = ROUNDED_ULPS) -> Tensor:
    """Return `value` with each element moved at random by up to `ulps` units in the last place of `dtype`.

    Integers, zeros, infinities and NaN do not change. No number changes its sign, or becomes infinite in `dtype`.
    The unit of a subnormal number is the smallest subnormal number.
    """
    if not value.is_floating_point():
        return value
    wide, limits = value.double(), torch.finfo(getattr(torch, dtype))
    moves = torch.rand(value.shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).to(value.device)
    unit = wide.abs().mul_(EPSILON[dtype]).clamp_min_(EPSILON[dtype] * limits.smallest_normal).mul_(wide != 0)
    moved = unit.mul_(ulps).mul_(moves).add_(wide)  # in place, as large weights are moved often
    moved = moved.where(moved.abs() <= limits.max, wide)  # NaN and infinities stay
    return moved.masked_fill_((moved < 0) != (wide < 0), 0.0).to(value.dtype)


def with_error_of_float64(narrow: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `truth`, moved as far as rounding to float64 may have moved it.

    truth: tensors of the reference in float64. Their errors cannot be measured, because no wider dtype exists. narrow:
    the same tensors in float32. The errors of `narrow` are scaled by the ratio of the two eps, since rounding errors
    are proportional to eps. A tensor with large errors in float32 is not moved.
    """
    scale = EPSILON["float64"] / EPSILON["float32"]
    return {
        name: wide + scale * (narrow[name].double() - wide)
        if Distance.of(narrow[name], wide).norm < PROPORTIONAL
        else wide
        for name, wide in truth.items()
    }
