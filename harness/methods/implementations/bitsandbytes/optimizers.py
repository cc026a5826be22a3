"""bitsandbytes' 8-bit AdamW, Lion and LAMB, and its paged AdamW, called through their method `step`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Tensor, nn
_OPERATION: dict[str, Any] = {"name": "bitsandbytes", "kind": "operation", "requires": ["bitsandbytes"]}
_PAGED = _OPERATION | {"name": "bitsandbytes-paged"}
_ONE_MOMENT = {"state1": "m", "absmax1": "m_absmax"}
_NAMES = _ONE_MOMENT | {"state2": "v", "absmax2": "v_absmax"}


@implements("adamw8bit_step", **_OPERATION)
def adamw8bit_step(p: Tensor, g: Tensor, step: int, **options: Any) -> tuple[Tensor, ...]:
    """Take one step of AdamW8bit from a given state. Return the new p, m, m_absmax, v and v_absmax.

    p is the parameter. m and v are the 8-bit codes of its two moments, and each block of codes has one absmax. options:
    the state (m, m_absmax, v, v_absmax), and the optimizer's options.
    """
    from bitsandbytes.optim import AdamW8bit

    return _step8bit(AdamW8bit, p, g, step, **options)


@implements("adamw8bit_step", **_PAGED)
def paged_adamw8bit_step(p: Tensor, g: Tensor, step: int, **options: Any) -> tuple[Tensor, ...]:
    """Take one step of PagedAdamW8bit; return the same tensors as `adamw8bit_step`. Paging changes no value."""
    from bitsandbytes.optim import PagedAdamW8bit

    with _without_the_warning():
        return _step8bit(PagedAdamW8bit, p, g, step, **options)


@implements("lion8bit_step", **_OPERATION)
def lion8bit_step(p: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Take one step of Lion8bit from the state m and m_absmax in `options`; return the new p, m and m_absmax."""
    from bitsandbytes.optim import Lion8bit

    return _step8bit(Lion8bit, p, g, 1, _ONE_MOMENT, **options)


@implements("lamb8bit_step", **_OPERATION)
def lamb8bit_step(p: Tensor, g: Tensor, step: int, **options: Any) -> tuple[Tensor, ...]:
    """Take one step of LAMB8bit from a given state; return the same tensors as `adamw8bit_step`."""
    from bitsandbytes.optim import LAMB8bit

    return _step8bit(LAMB8bit, p, g, step, **options)


def _step8bit(
    kind: Any, p: Tensor, g: Tensor, step: int, names: Mapping[str, str] = _NAMES, **options: Any
) -> tuple[Tensor, ...]:
    """Take one step of a bitsandbytes optimizer; return the new p and state.

    kind: class of the optimizer. names: bitsandbytes' name of a state tensor -> its name in `options`.
    """
    import torch

    if g.dtype != p.dtype:
        raise Unsupported("torch gives a parameter no gradient of another dtype")
    state_before = {name: options.pop(name) for name in names.values()}
    p = torch.nn.Parameter(p.clone())
    p.grad = g.clone()
    optimizer = kind([p], min_8bit_size=0, **options)
    optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
    state = optimizer.state[p]
    state["step"] = step - 1
    for bnb_name, name in names.items():
        state[bnb_name].copy_(state_before[name].detach().view(state[bnb_name].shape))
    optimizer.step()
    return p.detach(), *(state[bnb_name].flatten() for bnb_name in names)


@implements("paged_adamw", **_OPERATION)
def paged_adamw(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], **options: Any) -> tuple[Tensor, ...]:
    """Take one step of PagedAdamW for each list in `grads`. Return the new parameters. options: those of PagedAdamW."""
    from bitsandbytes.optim import PagedAdamW

    trained = _trained(params)
    _steps(PagedAdamW, trained, grads, **options)
    return tuple(p.detach() for p in trained)


@implements("paged_states", **_OPERATION)
def paged_states(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Return a float tensor with one number per parameter.

    The number is 1 if PagedAdamW marks the parameter's first moment as paged, and 0 otherwise.
    """
    from bitsandbytes.optim import PagedAdamW

    return _are_paged(PagedAdamW, params, grads)


@implements("paged_states", **_PAGED)
def paged_8bit_states(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Return a float tensor with one number per parameter.

    The number is 1 if PagedAdamW8bit marks the parameter's first moment as paged, and 0 otherwise.
    """
    from bitsandbytes.optim import PagedAdamW8bit

    return _are_paged(PagedAdamW8bit, params, grads)


def _are_paged(kind: Any, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    import torch

    trained = _trained(params)
    optimizer = _steps(kind, trained, [grads])
    are = [float(getattr(optimizer.state[p]["state1"], "is_paged", False)) for p in trained]
    return torch.tensor(are, dtype=torch.float32, device=trained[0].device)


def _trained(params: Sequence[Tensor]) -> list[nn.Parameter]:
    import torch

    return [torch.nn.Parameter(p.clone()) for p in params]


def _steps(kind: Any, trained: list[Any], grads: Sequence[Sequence[Tensor]], **options: Any) -> Any:
    optimizer = kind(trained, **options)
    with _without_the_warning():
        for step_grads in grads:
            for p, g in zip(trained, step_grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
    return optimizer


@contextmanager
def _without_the_warning() -> Iterator[None]:
    """Suppress the warning that nothing is paged on a CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield
