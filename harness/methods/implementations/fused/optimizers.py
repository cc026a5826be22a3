"""Operations of optimizers: 8-bit AdamW, its quantiser, and paged AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Tensor
_HOW: dict[str, Any] = {"name": "fused", "kind": "operation", "dtypes": DTYPES}


@implements("dynamic_quantize", **_HOW)
def dynamic_quantize(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 codes and the float32 absmax of each block."""
    from harness.kernels.torch.dynamic_quantize import dynamic_quantize

    return dynamic_quantize(x, block, signed)


@implements("adamw8bit_step", **_HOW)
def adamw8bit_step(p: Tensor, g: Tensor, **others: Any) -> tuple[Tensor, ...]:
    """Take one step from a given state. others: m, m_absmax, v, v_absmax, step and the optimizer's options."""
    from harness.kernels.torch.adamw8bit_step import adamw8bit_step

    return adamw8bit_step(p, g, **others)


@implements("paged_adamw", **_HOW)
def paged_adamw(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], **how: Any) -> tuple[Tensor, ...]:
    """Take steps of torch's AdamW; states of 100,000 elements or more are on the host between two steps."""
    return tuple(p.detach() for p in _paged_steps(params, grads, **how)[1])


@implements("paged_states", **_HOW)
def paged_states(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Return for each parameter whether its states are paged, as 1 or 0."""
    import torch

    optimizer, trained = _paged_steps(params, [grads])
    return torch.tensor([float(p in optimizer.where()) for p in trained], device=trained[0].device)


def _paged_steps(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], **how: Any) -> tuple[Any, list[Any]]:
    import torch

    from harness.kernels.torch.optimizers.paged import Paged

    trained = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = Paged(torch.optim.AdamW(trained, **how), budget=0)
    for several in grads:
        for p, g in zip(trained, several, strict=True):
            p.grad = g
        optimizer.step()
    return optimizer, trained
