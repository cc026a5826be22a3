"""Find out which cases the reference accepts.

Some settings contradict each other, and some do not fit a kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch

from harness.conformance.drawing.factors import LARGEST_RANK
from harness.conformance.execution.parity_model import ParityModel, is_built
from harness.conformance.parity_suite import (
    AnyCase,
    CaseShape,
    Kind,
    MethodCase,
    MethodSuite,
    OperationCase,
    ParitySuite,
)
from harness.conformance.subject import attach_reference, configure
from harness.methods.spec import method_info

_LARGEST_DEEP = 4096
"""Largest number of elements in a weight of a ParityModel of the form `deep`. It has many layers to adapt, and a check
works on each of them."""


_LARGEST_BUILT_SIDE = 160
"""Largest side of a weight in the small model that is built to find out whether the reference accepts a case. If the
case has a larger rank, the side may be as large as the rank."""
_LARGEST_INPUT = 600_000
"""Largest number of elements that the input and the output of a layer, or the rows of all chosen experts, have
together."""
_LARGEST_STACK = 1_000_000
"""Largest number of elements in the stacked weights of an Operation's experts, or in its distinct adapters. With 300 experts
as large as other weights, a check would take minutes."""


def is_accepted(plan: ParitySuite, case: AnyCase) -> bool:
    """Return whether a case can be tried with the reference.

    For a Method or a quantised base, the parity model must exist for the case (see `is_built`) and be small enough, and
    the reference must accept the settings. In bfloat16, weights must have the size `normal`. An Operation's input, stacked
    experts and distinct adapters must not be too large. If DoRA's weight and update cancel, the input must have the
    magnitude `normal`, because the gain m / norm is large. Every other case can be tried.
    """
    if isinstance(case, OperationCase) and "shape" in case.values:
        shape, experts = case.values["shape"], case.values.get("experts", 0)
        rank = max(case.values.get("ranks", [case.values.get("rank", 1)]), default=1)
        sequences = len(case.values.get("ids", (0,)))
        each = case.values.get("rows", (sequences, case.values.get("tokens", 1), case.values.get("chosen", 1)))
        rows = math.prod(each)
        adapters = max(experts, case.values.get("distinct", 0))
        stack = max(experts * math.prod(shape), adapters * rank * sum(shape))
        if case.magnitude != "normal" and case.values.get("kind") == "cancelled":
            return False
        return bool(stack <= _LARGEST_STACK and rows * sum(shape) <= _LARGEST_INPUT)
    if not isinstance(case, MethodCase) or not isinstance(plan, MethodSuite):
        return True
    if not is_built(case.kind, case.model):
        return False
    if case.model == "deep" and case.shape.inputs * case.shape.outputs > _LARGEST_DEEP:
        return False
    if case.shape.tokens * (case.shape.inputs + case.shape.outputs) > _LARGEST_INPUT:
        return False
    if case.weights != "normal" and case.dtype == "bfloat16":
        return False  # its few digits lose an update that is a 256th of the weight
    sides: tuple[int, ...] = case.shape.inputs, case.shape.outputs
    if "block_size" not in method_info(plan.method).fields:  # a block must divide the side itself
        # Larger sides would change nothing, because no rank of the case is larger.
        sizes = [value for value in case.config.values() if type(value) is int and value <= LARGEST_RANK]
        sides = tuple(min(side, max([_LARGEST_BUILT_SIDE, *sizes])) for side in sides)
    return _attaches(plan.method, tuple(sorted(case.config.items())), case.kind, *sides)


@lru_cache(maxsize=4096)
def _attaches(method: str, config: tuple[tuple[str, Any], ...], kind: Kind, inputs: int, outputs: int) -> bool:
    model = ParityModel(kind, CaseShape.model_validate({"tokens": 1, "in": inputs, "out": outputs}), torch.float32, 0)
    try:
        resolved = replace(configure(method, dict(config)), **_quick_start(method))
        names = model.targets if hasattr(resolved, "targets") else None
        attach_reference(method, model, resolved, names, torch.Generator().manual_seed(0))
    except ValueError:
        return False
    return True


@cache
def _quick_start(method: str) -> Mapping[str, int]:
    return method_info(method).spec.quick_start
