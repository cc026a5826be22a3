"""The optimizers' Operations: 8-bit AdamW, its blocks of codes, and AdamW whose states are paged."""

from __future__ import annotations

from typing import Any

from harness.methods.registry import DTYPES, implements

_HOW: dict[str, Any] = {"name": "fused", "kind": "operation", "dtypes": DTYPES}


@implements("dynamic_quantize", **_HOW)
def dynamic_quantize(x: Any, block: int, signed: bool) -> tuple[Any, Any]:
    """Return uint8 codes and the float32 absmax of each block."""
    from harness.kernels.torch.dynamic_quantize import dynamic_quantize

    return dynamic_quantize(x, block, signed)


@implements("adamw8bit_step", **_HOW)
def adamw8bit_step(p: Any, g: Any, **others: Any) -> tuple[Any, ...]:
    """Take one step from the state given. others: m, m_absmax, v, v_absmax, step and the optimizer's knobs."""
    from harness.kernels.torch.adamw8bit_step import adamw8bit_step

    return adamw8bit_step(p, g, **others)


@implements("paged_adamw", **_HOW)
def paged_adamw(params: Any, grads: Any, **how: Any) -> tuple[Any, ...]:
    """Take the steps of torch's AdamW; no state of 100,000 elements stays on the device between two of them."""
    return tuple(p.detach() for p in _paged_steps(params, grads, **how)[1])


@implements("paged_states", **_HOW)
def paged_states(params: Any, grads: Any) -> Any:
    """Return for each parameter whether its states are paged, as 1 or 0."""
    import torch

    optimizer, trained = _paged_steps(params, [grads])
    return torch.tensor([float(p in optimizer.where()) for p in trained], device=trained[0].device)


def _paged_steps(params: Any, grads: Any, **how: Any) -> tuple[Any, list[Any]]:
    import torch

    from harness.kernels.torch.optimizers.paged import Paged

    trained = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = Paged(torch.optim.AdamW(trained, **how), budget=0)
    for several in grads:
        for p, g in zip(trained, several, strict=True):
            p.grad = g
        optimizer.step()
    return optimizer, trained
