"""Count the FLOPs of the matrix products in a training step, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    """Counter of the FLOPs of all matrix products, by torch's own formulas.

    torch's FlopCounterMode is not used, because its module hooks change the computation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # torch has no formula for addmm_.
        op = torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket
        if op in flop_registry:
            self.total += flop_registry[op](*args, **(kwargs or {}), out_val=out)
        return out


def flops(step: Callable[[], Any]) -> int:
    """Return the FLOPs of all matrix products that torch computes in one call of `step`.

    Each multiplication and each addition counts as one FLOP. Products inside Triton kernels are not counted.
    """
    counter = _Counter()
    with counter:
        step()
    return counter.total
