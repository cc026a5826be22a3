"""Ways (forms) in which a program may use a layer around a call: hooks, other gradient functions, errors, loading."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.comparison.call_forms import Call, Form, leaf_of, owns, tensors_of_copy
from harness.conformance.comparison.observations import preserved_state

_FACTORS_OF_KRON = ("C", "W2")
"""LoKr's tensors that torch.kron may get. Its backward pass does not notice that they were changed."""


def _with_hooks_below(call: Call) -> dict[str, Tensor]:
    """Call the layer while forward hooks keep the outputs of its base layer.

    If a kept output changes, or if the base layer runs twice on inputs of the shape of x, add an entry, so that the
    comparison fails. A program may also run the base layer on the unit vectors, to read a packed weight.
    """
    frozen = {id(number) for number in call.numbers} - {id(tensor) for tensor in call.tensors.values()}
    weights = {id(p) for p in call.layer.parameters()} & frozen
    bases = [
        m
        for m in call.layer.modules()
        if m is not call.layer and any(id(p) in weights for p in m.parameters(recurse=False))
    ]
    kept, runs = list[tuple[Tensor, Tensor]](), Counter[nn.Module]()

    def keep(module: nn.Module, given: tuple[Any, ...], output: object) -> None:
        runs[module] += bool(given) and given[0].shape == call.x.shape
        if isinstance(output, Tensor):
            kept.append((output.detach(), output.detach().clone()))

    handles = [module.register_forward_hook(keep) for module in bases]
    try:
        seen = call.observe(call.x, call.dy)
    finally:
        for handle in handles:
            handle.remove()
    changed = any(not torch.equal(now.nan_to_num(), before.nan_to_num()) for now, before in kept)
    seen |= {"runs of the base layer": torch.ones(1)} if max(runs.values(), default=0) > 1 else {}
    return seen | ({"a kept output of the base layer, changed": torch.ones(1)} if changed else {})


def _after_failed_calls(call: Call) -> dict[str, Tensor] | None:
    """Call the layer after calls that raised, with an input of the wrong width. Return None for token numbers.

    On a GPU, return None too: a kernel without a check of shapes would end the process.
    """
    if not call.x.is_floating_point() or call.x.is_cuda:
        return None
    for recorded in (True, False):
        with (
            preserved_state(call.layer, call.tensors, training=False),
            torch.set_grad_enabled(recorded),
            suppress(Exception),
        ):
            call.layer(torch.cat([call.x, call.x], dim=1))
    return call.observe(call.x, call.dy)


def _after_zeros(call: Call) -> dict[str, Tensor] | None:
    """Call a copy without gradients while its trained tensors are zero, give it the right values, and call it again.

    Most adapters begin with an update of zero. A program may evaluate the model first, and then load an adapter.
    """
    if not owns(call.layer, call.tensors) or call.is_packed:
        return None
    made = copy.deepcopy(call.layer)
    made.eval()
    tensors = tensors_of_copy(call.layer, made, call.tensors)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
        made(call.x)
        for name, tensor in tensors.items():
            tensor.copy_(call.tensors[name])
        return {"y": made(call.x).clone()}


def _by_autograd_grad(call: Call) -> dict[str, Tensor]:
    """Compute the gradients by torch.autograd.grad, which must return them instead of adding to `grad`.

    Then compute other gradients in the same way. These must not change the first ones.
    """

    def run(dy: Tensor) -> dict[str, Tensor]:
        leaf = leaf_of(call.x)
        y = call.layer(leaf)
        wanted = {f"grad {name}": tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
        wanted |= {"grad x": leaf} if leaf.requires_grad else {}
        if not y.requires_grad or y.shape != dy.shape:
            return {"y": y.detach()}
        found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
        return {"y": y.detach()} | {n: t for n, t in zip(wanted, found, strict=True) if t is not None}

    with preserved_state(call.layer, call.tensors, call.training):
        seen = run(call.dy)
        run(call.dy.flip(0))
    return seen


def _tensors_in_place(call: Call) -> dict[str, Tensor] | None:
    """Change one trained tensor in place between forward and backward, as a step of an optimizer would.

    Torch may refuse this backward pass, and a layer under activation checkpointing computes the gradients with the
    changed values. Otherwise the gradients are those of the forward pass. Return the results of the first tensor for
    which this holds, or None.
    """
    for tensor in (tensor for name, tensor in call.tensors.items() if name not in _FACTORS_OF_KRON):
        held = tensor.detach().clone()

        def run(layer: nn.Module, x: Tensor, tensor: Tensor = tensor) -> Tensor:
            y: Tensor = layer(x)
            with torch.no_grad():
                tensor.mul_(-3)
            return y

        try:
            seen = call.observe(call.x, call.dy, call=run)
            recomputed = call.observe(call.x, call.dy)
            if not all(torch.equal(seen[name], recomputed[name]) for name in seen if name != "y"):
                return seen
        except RuntimeError:
            continue
        finally:
            with torch.no_grad():
                tensor.copy_(held)
    return None


PROGRAMS: dict[str, Form] = {
    "with hooks on the base layer": Form(_with_hooks_below),
    "by torch.autograd.grad": Form(_by_autograd_grad),
    "with tensors that are changed before backward": Form(_tensors_in_place),
    "after calls that failed": Form(_after_failed_calls),
    "under no_grad after its tensors were zero": Form(_after_zeros, "all gradients"),
}
"""Name -> form that calls a layer as a program with hooks, errors or changes of its own may do."""
