"""Call stacked experts like any other layer: with an input alone, and in float64.

Stacked experts are a mixture of experts with the weights of all experts in one tensor. In a model, the router chooses
the experts. A check has no router, so this module fixes the choice for every program under test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reference.shared.layers import kind_of, stacked_weights

_EIGHTHS = 8
"""Weights of the chosen experts are multiples of 1/8, which every dtype represents exactly."""
_CHOSEN = 2
"""Largest number of chosen experts per token."""


def fix_routing(module: nn.Module) -> None:
    """Let `module` be called with an input alone, and add the fixed choice of experts to such a call.

    A call with a choice stays as it is. A second call of this function changes nothing. module: stacked experts, or an
    adapter layer around them.
    """
    if _with_choice not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_with_choice)


def fixed_choice(experts: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices (T, N) of the chosen experts and their weights (T, N) for an input x (T, D).

    The choice depends only on T. No token chooses expert 0, unless there is no other expert.
    """
    generator, used = torch.Generator().manual_seed(len(x)), max(1, experts - 1)
    chosen = (
        torch.rand(len(x), used, generator=generator, dtype=torch.float32).topk(min(_CHOSEN, used)).indices
        + experts
        - used
    )
    weights = torch.randint(1, _EIGHTHS, chosen.shape, generator=generator) / _EIGHTHS
    return chosen.to(x.device), weights.to(x.device, x.dtype)


def one_by_one(model: Any, dtype: torch.dtype) -> None:
    """If `dtype` is float64, let a mixture of experts or one module of experts compute each expert separately.

    torch has no grouped matrix products in float64.
    """
    if dtype != torch.float64:
        return
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    elif kind_of(model) == "experts" and hasattr(model, "config"):
        model.config._experts_implementation = "eager"


def _with_choice(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Add the fixed choice to the arguments of a call that has only the input."""
    if len(arguments) != 1:
        return None
    stacks = (stacked_weights(one) for one in module.modules())
    experts = len(next(iter(next(filter(None, stacks)).values())))
    return arguments[0], *fixed_choice(experts, arguments[0])
