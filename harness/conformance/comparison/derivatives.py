"""Derivatives that training rarely uses: second derivatives of a layer, and derivatives by torch.func."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from harness.conformance.comparison.observations import preserved_state


def second_order(layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the sum of z * dL/dz over the input z = x and all `tensors` z, by name.

    Each dL/dz is a gradient when the gradient of the layer's output is dy. Each factor z is a constant. The result is
    empty if no dL/dz has a graph.
    """
    leaf = x.detach().clone().requires_grad_(True)
    with preserved_state(layer, tensors, training=False):
        y = layer(leaf)
        if not y.requires_grad:
            return {}
        leaves = [leaf, *(t for t in tensors.values() if t.requires_grad)]
        first = torch.autograd.grad(y, leaves, dy, create_graph=True, allow_unused=True)
        products = [
            (g * z.detach()).sum() for g, z in zip(first, leaves, strict=True) if g is not None and g.requires_grad
        ]
        if not products:
            return {}
        torch.stack(products).sum().backward()
        named = {"x": leaf, **tensors}
        return {f"grad {n}": t.grad.detach().clone() for n, t in named.items() if t.grad is not None}


def by_functorch(
    layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor, *, training: bool = False
) -> dict[str, Tensor]:
    """Return the output by torch.func.vmap, and the derivative in the direction x by torch.func.jvp.

    vmap maps over the rows of x. The result of vmap or jvp is missing if torch refuses to compute it, as it does for an
    autograd.Function without a rule for vmap or jvp.
    """
    seen: dict[str, Tensor] = {}
    with preserved_state(layer, tensors, training):
        for name, run in (
            ("y by vmap", lambda: torch.func.vmap(layer)(x.detach().unsqueeze(1)).squeeze(1)),
            ("derivative by jvp", lambda: torch.func.jvp(layer, (x.detach(),), (x.detach(),))[1]),
        ):
            with suppress(RuntimeError, NotImplementedError):
                seen[name] = run().detach().clone()
    return seen
