"""bitsandbytes' 8-bit and paged AdamW, through their own `step`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.methods.implementations.bitsandbytes.quantisers import DTYPES
from harness.methods.registry import implements

_HOW: dict[str, Any] = {"name": "bitsandbytes", "kind": "operation", "dtypes": DTYPES, "requires": ["bitsandbytes"]}
_PAGED = _HOW | {"name": "bitsandbytes-paged"}
_NAMES = {"state1": "m", "absmax1": "m_absmax", "state2": "v", "absmax2": "v_absmax"}


@implements("adamw8bit_step", **_HOW)
def adamw8bit_step(p: Any, g: Any, step: int, **others: Any) -> tuple[Any, ...]:
    """Take one step of AdamW8bit from the state given. others: m, m_absmax, v, v_absmax and the optimizer's knobs."""
    from bitsandbytes.optim import AdamW8bit

    return _step8bit(AdamW8bit, p, g, step, **others)


@implements("adamw8bit_step", **_PAGED)
def paged_adamw8bit_step(p: Any, g: Any, step: int, **others: Any) -> tuple[Any, ...]:
    """Take the same step by PagedAdamW8bit: where the states live changes no value."""
    from bitsandbytes.optim import PagedAdamW8bit

    with _without_the_warning():
        return _step8bit(PagedAdamW8bit, p, g, step, **others)


def _step8bit(kind: Any, p: Any, g: Any, step: int, **others: Any) -> tuple[Any, ...]:
    import torch

    given = {name: others.pop(name) for name in _NAMES.values()}
    p = torch.nn.Parameter(p.clone())
    p.grad = g.clone()
    optimizer = kind([p], min_8bit_size=0, **others)
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
    from bitsandbytes.optim import PagedAdamW

    trained = _trained(params)
    _steps(PagedAdamW, trained, grads, **how)
    return tuple(p.detach() for p in trained)


@implements("paged_states", **_HOW)
def paged_states(params: Any, grads: Any) -> Any:
    """Return for each parameter whether bitsandbytes marks its first moment as paged, as 1 or 0."""
    from bitsandbytes.optim import PagedAdamW

    return _are_paged(PagedAdamW, params, grads)


@implements("paged_states", **_PAGED)
def paged_8bit_states(params: Any, grads: Any) -> Any:
    """Return the same of PagedAdamW8bit, whose states are a quarter of the size."""
    from bitsandbytes.optim import PagedAdamW8bit

    return _are_paged(PagedAdamW8bit, params, grads)


def _are_paged(kind: Any, params: Any, grads: Any) -> Any:
    import torch

    trained = _trained(params)
    optimizer = _steps(kind, trained, [grads])
    return torch.tensor([float(getattr(optimizer.state[p]["state1"], "is_paged", False)) for p in trained])


def _trained(params: Any) -> list[Any]:
    import torch

    return [torch.nn.Parameter(p.clone()) for p in params]


def _steps(kind: Any, trained: list[Any], grads: Any, **how: Any) -> Any:
    optimizer = kind(trained, **how)
    with _without_the_warning():
        for several in grads:
            for p, g in zip(trained, several, strict=True):
                p.grad = g.clone()
            optimizer.step()
    return optimizer


@contextmanager
def _without_the_warning() -> Iterator[None]:
    """Keep quiet that on the CPU nothing is paged: `paged_states` says so too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield
