"""Gated activations for the feed-forward kernels of Axolotl and Unsloth: the library's Triton code, or torch on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from harness.errors import Unsupported

INTERPRETED = ("float32", "float16")
"""Dtypes in which Triton's interpreter computes correctly."""
Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""Two functions of an activation: the forward (gate, up) -> h, and the backward (dh, gate, up) -> (h, and the gradients of
gate and up in the library's order)."""


def activation_functions(module: str, forward: str, backward: str, x: Tensor, *, up_first: bool = False) -> Pair:
    """Return the forward and the backward function of an activation in a library.

    On a CPU without Triton's interpreter, return functions that compute the same with torch. module, forward, backward:
    names of the library's module and functions. x: a tensor with the dtype and device of the call. up_first: True if the
    library's backward function returns the gradient of up before that of gate. Raises Unsupported for an activation or a
    dtype that the interpreter cannot compute.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not x.is_cuda and not interpreted:
        function: Callable[[Tensor], Tensor] = silu
        if "geglu" in module:
            function = partial(gelu, approximate="tanh" if "approx" in forward else "none")
        return _of_torch(function, up_first=up_first)
    if not x.is_cuda and str(x.dtype).removeprefix("torch.") not in INTERPRETED:
        raise Unsupported(
            f"Triton's interpreter, which runs the activation, is correct in {' and '.join(INTERPRETED)} only"
        )
    if not x.is_cuda and "approx" in forward:
        raise Unsupported("Triton's interpreter has no libdevice.tanh")
    kernels = import_module(module)
    if not x.is_cuda:
        _allocate_on_the_cpu(kernels)
    return getattr(kernels, forward), getattr(kernels, backward)


def _of_torch(function: Callable[[Tensor], Tensor], *, up_first: bool) -> Pair:
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return function(gate) * up

    def backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # as with the interpreter, where a tensor that the kernel changed is missed
            raise RuntimeError("a kernel records no graph, so that a gradient of a gradient cannot be computed")
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_(True)
            activated = function(leaf)
        (of_gate,) = torch.autograd.grad(activated, leaf, dh * up)
        activated = activated.detach()
        gradients = (dh * activated, of_gate) if up_first else (of_gate, dh * activated)
        return activated * up, *gradients

    return forward, backward


def _allocate_on_the_cpu(kernels: Any) -> None:
    """Let `torch.empty` in a module of kernels ignore `device`, so that it allocates on the CPU for the interpreter."""

    def empty(*shape: Any, device: object = None, **options: Any) -> Tensor:
        return torch.empty(*shape, **options)

    if kernels.torch is torch:
        kernels.torch = SimpleNamespace(**vars(torch) | {"empty": empty})
