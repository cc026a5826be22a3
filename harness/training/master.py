"""AdamW for weights of 16 bits: it keeps weights and moments of its own in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FIRST_LOSS_SCALE = 2.0**10
"""A power of two, so that scaling rounds nothing; it lifts gradients from 6e-11 into what float16 can hold."""


class MasterAdamW(torch.optim.Optimizer):
    """AdamW over float32 copies (masters) of parameters; after each step the parameters are the rounded masters.

    In float16 AdamW's eps of 1e-8 is 0, and in bfloat16 a step of a thousandth of a weight is lost to rounding; with
    float32 masters, as in mixed-precision training, neither matters. What something else writes into a parameter between
    two steps is taken over. `state` holds the masters too, so that the memory ledger counts them.

    loss_scale: what the loss is multiplied by before its backward pass and gradients are divided by, 1 where no
    parameter is float16 (`scales` is False). `relax` halves it; it never grows, so that a run stays easy to follow.
    """

    def __init__(self, groups: list[dict[str, Any]], **knobs: Any) -> None:
        super().__init__(groups, knobs)
        self._inner = torch.optim.AdamW(
            [{**group, "params": [_master(p) for p in group["params"]]} for group in self.param_groups], **knobs
        )
        self._pairs = [
            (p, m)
            for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True)
            for p, m in zip(group["params"], inner["params"], strict=True)
        ]
        self.scales = any(p.dtype == torch.float16 for p, _ in self._pairs)
        self.loss_scale = FIRST_LOSS_SCALE if self.scales else 1.0

    def held(self, parameter: Tensor) -> Tensor:
        """Return a parameter as it is kept between steps: its master. A step may be too small to be seen in 16 bits."""
        return next((m.detach() for p, m in self._pairs if p is parameter), parameter.detach())

    def relax(self) -> bool:
        """If a gradient is infinite or NaN, halve the loss scale and say so; at a scale of 1 it is not ours to mend."""
        if self.loss_scale == 1.0 or all(bool(p.grad.isfinite().all()) for p, _ in self._pairs if p.grad is not None):
            return False
        self.loss_scale /= 2
        return True

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's gradient in float32, its scale taken out."""
        return None if parameter.grad is None else _wide(parameter.grad) / self.loss_scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not used."""
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"] = group["lr"]  # the schedule writes to the outer groups
        for p, master in self._pairs:
            master.grad = self.gradient(p)
            master.copy_(torch.where(p == master.to(p.dtype), master, p))  # else p was written to since the last step
        self._inner.step()
        for p, master in self._pairs:
            p.copy_(master)
            master.grad = None
            self.state[p] = {"master": master, **self._inner.state[master]}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _master(parameter: Tensor) -> Tensor:
    return _wide(parameter.detach()).clone().requires_grad_(True)
