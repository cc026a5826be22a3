"""Arithmetic that rounds at random, as another correct program may round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.tolerance_constants import ROUNDED_ULPS

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes whose results move, and their names."""
_ULPS = 2 * ROUNDED_ULPS
"""Largest move of a result. Two programs that each round a number once may be a whole unit apart, one above the exact
number and one below it."""


class OtherRounding(TorchDispatchMode):
    """In this context, torch computes each operation in float64, moves every number at random, and rounds it.

    Moved inputs alone do not show what the rounding of an intermediate result may do. Two terms of a difference move
    together if both depend on the same input. A number that the dtype holds exactly does not move, so copies stay equal.
    Operations that draw random numbers, and those that return nothing, such as a fused optimizer step, compute as usual.
    seed: seed of the moves.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the result of the operation `func`, in which every number is rounded at random."""
        given = (args, kwargs or {})
        if func.is_view or torch.Tag.nondeterministic_seeded in func.tags or not any(map(_moves, tree_leaves(given))):
            return func(*args, **given[1])
        wide_args, wide_kwargs = tree_map(_widened, given)  # before the call, which may overwrite its arguments
        found = func(*args, **given[1])
        try:
            exact = func(*wide_args, **wide_kwargs)
        except RuntimeError:  # not implemented in float64
            return found
        for result, truth in zip(tree_leaves(found), tree_leaves(exact), strict=True):
            if _moves(result):
                self._move(result, truth.double())
        return found

    def _move(self, result: Tensor, truth: Tensor) -> None:
        is_exact = result.double() == truth
        if not is_exact.all():
            moved = perturbed(truth, _NAMES[result.dtype], self._generator, _ULPS)
            result.copy_(torch.where(is_exact, result, moved.to(result.dtype)))


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NAMES


def _widened(value: Any) -> Any:
    return value.double() if _moves(value) else value
