"""Inputs for kernels that accept (batch, tokens, features) only: those of Axolotl and Unsloth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def in_three_dimensions(x: Tensor) -> Tensor:
    """Return x in the shape (batch, tokens, features), where the batch is 1 if x has another number of dimensions."""
    return x if x.dim() == 3 else x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])


def in_shape_of(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the leading dimensions of x."""
    return y if x.dim() == 3 else y.reshape(*x.shape[:-1], y.shape[-1])
