"""The base class of weights that are stored as codes and constants. Not a Method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn


class QuantisedWeight(nn.Module):
    """A frozen weight as codes and constants, whose dtypes stay as they are if the model is cast to another dtype.

    A float32 constant that is rounded to bfloat16 would be off by up to 0.2 %, and with it all weights of its block.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, now in list(self.named_buffers(recurse=False)):
            if now.dtype != before[name].dtype:
                setattr(self, name, before[name].to(now.device))
        return self
