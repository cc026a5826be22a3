"""bitsandbytes' 8-bit and paged AdamW, through their own `step`."""

from __future__ import annotations

from typing import Any

from harness.implementations.bitsandbytes.quantisers import DTYPES
from harness.registry import implements

_HOW: dict[str, Any] = {"name": "bitsandbytes", "kind": "operation", "dtypes": DTYPES, "requires": ["bitsandbytes"]}
_NAMES = {"state1": "m", "absmax1": "m_absmax", "state2": "v", "absmax2": "v_absmax"}


@implements("adamw8bit_step", **_HOW)
def adamw8bit_step(p: Any, g: Any, step: int, **others: Any) -> tuple[Any, ...]:
    """Take one step of AdamW8bit from the state given. others: m, m_absmax, v, v_absmax and the optimizer's knobs."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    given = {name: others.pop(name) for name in _NAMES.values()}
    p = torch.nn.Parameter(p.clone())
    p.grad = g.clone()
    optimizer = AdamW8bit([p], min_8bit_size=0, **others)
    optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
    state = optimizer.state[p]
    state["step"] = step - 1
    for theirs, ours in _NAMES.items():
        state[theirs].copy_(given[ours].view(state[theirs].shape))
    optimizer.step()
    return p.detach(), *(state[theirs].flatten() for theirs in _NAMES)


@implements("paged_adamw", **_HOW)
def paged_adamw(params: Any, grads: Any, **how: Any) -> tuple[Any, ...]:
    """Take the steps of PagedAdamW."""
    trained = _trained(params)
    _steps(trained, grads, **how)
    return tuple(p.detach() for p in trained)


@implements("paged_states", **_HOW)
def paged_states(params: Any, grads: Any) -> Any:
    """Return for each parameter whether bitsandbytes marks its first moment as paged, as 1 or 0."""
    import torch

    trained = _trained(params)
    optimizer = _steps(trained, [grads])
    return torch.tensor([float(getattr(optimizer.state[p]["state1"], "is_paged", False)) for p in trained])


def _trained(params: Any) -> list[Any]:
    import torch

    return [torch.nn.Parameter(p.clone()) for p in params]


def _steps(trained: list[Any], grads: Any, **how: Any) -> Any:
    import warnings

    from bitsandbytes.optim import PagedAdamW

    optimizer = PagedAdamW(trained, **how)
    with warnings.catch_warnings():
        # On the CPU it warns that it pages nothing; `paged_states` says so too.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        for several in grads:
            for p, g in zip(trained, several, strict=True):
                p.grad = g.clone()
            optimizer.step()
    return optimizer
