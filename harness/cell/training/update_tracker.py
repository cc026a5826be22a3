"""Track which trained tensors have changed from their initial values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Look = Callable[[Tensor], Tensor]


class UpdateTracker:
    """Compares tensors after each step with their initial values, until every one has changed.

    The end alone would not show it: AdaLoRA sets pruned values back to zero, their initial value.
    """

    def __init__(self, start: Mapping[str, Tensor], look: Look) -> None:
        """start: name -> initial value. look: returns the part of a tensor that is compared with it."""
        self._start, self._look = dict(start), look

    def observe(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Compare the tensors that have not changed yet, after a step; `tensors` is called only if there are any."""
        now = tensors() if self._start else {}
        for name in [name for name in self._start if name in now]:
            if not _same(self._start[name], self._look(now[name])):
                del self._start[name]

    def unchanged(self, now: Mapping[str, Tensor]) -> list[str]:
        """List the names in `now` of tensors that never changed."""
        return [name for name in now if name in self._start]


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal values; equal dtypes are compared without a copy."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
