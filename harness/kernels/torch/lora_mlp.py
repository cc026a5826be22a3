"""A gated feed-forward block, down(activation(gate(x)) * up(x)), with LoRA or DoRA on its three layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from harness.kernels.torch.lora_qkv import adapted_linears
from harness.kernels.torch.support.autocast import outside_autocast

_CUBIC = 0.044715
"""Coefficient of GELU's approximation by tanh."""


class _Gated(torch.autograd.Function):
    """Autograd function for activation(gate) * up. The backward pass computes the activation again from gate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        need_gate, need_up = ctx.needs_input_grad[:2]
        return (
            dh * up * _slope(gate, ctx.activation) if need_gate else None,
            dh * _activated(gate, ctx.activation) if need_up else None,
            None,
        )


def _activated(x: Tensor, activation: str) -> Tensor:
    """Return the activation of x. Raises ValueError unless `activation` is `silu`, `gelu` or `gelu-tanh`."""
    if activation == "silu":
        return silu(x)
    if activation not in ("gelu", "gelu-tanh"):
        raise ValueError(f"unknown activation {activation!r}; there are silu, gelu and gelu-tanh")
    return gelu(x, approximate="tanh" if activation == "gelu-tanh" else "none")


def _slope(x: Tensor, activation: str) -> Tensor:
    """Return the derivative of the activation at x, computed in float32 if x has 16 bits."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    if activation == "silu":
        s = wide.sigmoid()
        slope = s * (1 + wide * (1 - s))
    elif activation == "gelu":
        slope = (1 + (wide / math.sqrt(2)).erf()) / 2 + wide * (-wide.square() / 2).exp() / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(2 / math.pi)
        t = (c * (wide + _CUBIC * wide**3)).tanh()
        slope = (1 + t) / 2 + wide / 2 * (1 - t.square()) * c * (1 + 3 * _CUBIC * wide.square())
    return slope.to(x.dtype)


def lora_mlp(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ms: Sequence[Tensor] | None,
    activation: str,
) -> Tensor:
    """Return down(activation(gate(x)) * up(x)), shape (..., D), for x (..., D).

    Each list has three items, for gate, up and down; `adapted_linears` describes them. If `ms` is given, the layers are
    DoRA's. activation: `silu`, `gelu` or `gelu-tanh`. Raises ValueError for any other activation.
    """

    def layers(x: Tensor, which: slice) -> list[Tensor]:
        bias, m = None if biases is None else biases[which], None if ms is None else ms[which]
        return adapted_linears(x, Ws[which], bias, As[which], Bs[which], scalings[which], m)

    gate, up = layers(x, slice(0, 2))
    hidden: Tensor = _Gated.apply(gate, up, activation)
    return layers(hidden, slice(2, 3))[0]
