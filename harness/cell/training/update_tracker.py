"""Which of the trained tensors have moved from where they began."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Look = Callable[[Tensor], Tensor]


class UpdateTracker:
    """Looks at tensors after each step until every one has moved.

    The end alone would not tell: AdaLoRA sets what it prunes back to zero, which is where it began.
    """

    def __init__(self, start: Mapping[str, Tensor], look: Look) -> None:
        """start: the values to move from, by name. look: returns what of a tensor is compared with them."""
        self._start, self._look = dict(start), look

    def seen(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Look after a step at what has not moved yet; `tensors` is only asked for while there is any."""
        now = tensors() if self._start else {}
        for name in [name for name in self._start if name in now]:
            if not _same(self._start[name], self._look(now[name])):
                del self._start[name]

    def still(self, now: Mapping[str, Tensor]) -> list[str]:
        """List those of `now` that never moved."""
        return [name for name in now if name in self._start]


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare the values of two tensors, of which one may be in a wider dtype; of equal dtypes neither is copied."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
