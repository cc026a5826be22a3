"""Shape inputs for the layers of Axolotl, Unsloth and LitGPT, which accept (batch, tokens, features) only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def in_three_dimensions(x: Tensor) -> Tensor:
    """Return x in the shape (batch, tokens, features). If x does not have three dimensions, the batch is 1."""
    return x if x.dim() == 3 else x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])


def in_shape_of(x: Tensor, y: Tensor) -> Tensor:
    """Return y, reshaped so that all dimensions but the last are those of x."""
    return y if x.dim() == 3 else y.reshape(*x.shape[:-1], y.shape[-1])
