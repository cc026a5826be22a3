"""Optimizers for 16-bit weights that store weights and moments in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
FIRST_LOSS_SCALE = 2.0**10
"""A power of two, so that scaling does not round. With it, float16 represents gradients down to 6e-11."""


class MasterWeights(torch.optim.Optimizer):
    """An optimizer over float32 copies (masters) of its parameters. After each step the parameters are the rounded masters.

    In float16, AdamW's eps of 1e-8 and the square of a small gradient are 0; in bfloat16, rounding removes a step of a
    thousandth of a weight. Float32 masters, as in mixed-precision training, avoid both. The masters adopt values that other
    code writes to a parameter between two steps. `state` includes the masters, so that the memory ledger counts them.

    inner: a new optimizer over the parameters; it steps the masters from now on. `loss_scale` multiplies the loss before
    its backward pass and divides gradients; it is 1 if no parameter is float16 (`scales` is False). `lower_loss_scale`
    halves it. It never grows, which keeps runs simple.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in inner.param_groups], dict(inner.defaults))
        self.inner = inner
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for group, masters in zip(self.param_groups, inner.param_groups, strict=True):
            masters["params"] = [_master(p) for p in group["params"]]
            self._pairs += zip(group["params"], masters["params"], strict=True)
        self.scales = any(p.dtype == torch.float16 for p, _ in self._pairs)
        self.loss_scale = FIRST_LOSS_SCALE if self.scales else 1.0

    def master_of(self, parameter: Tensor) -> Tensor:
        """Return the master of a parameter, which shows steps that are too small for 16 bits."""
        return next((m.detach() for p, m in self._pairs if p is parameter), parameter.detach())

    def lower_loss_scale(self) -> bool:
        """If a gradient is infinite or NaN and the loss scale is above 1, halve the scale and return True."""
        finite = [p.grad.isfinite().all() for p, _ in self._pairs if p.grad is not None]
        if (
            self.loss_scale == 1.0 or not finite or bool(torch.stack(finite).all())
        ):  # waits once for a GPU, not hundreds of times
            return False
        self.loss_scale /= 2
        return True

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's gradient in float32, divided by the loss scale."""
        return None if parameter.grad is None else _wide(parameter.grad) / self.loss_scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not used."""
        for group, masters in zip(self.param_groups, self.inner.param_groups, strict=True):
            masters["lr"] = group["lr"]  # the schedule writes to the outer groups
        stepped = [(p, master) for p, master in self._pairs if p.grad is not None]
        for p, master in stepped:
            master.grad = self.gradient(p)
            master.copy_(torch.where(p == master.to(p.dtype), master, p))  # else p was written to since the last step
        self.inner.step()
        for p, master in stepped:
            p.copy_(master)
            master.grad = None
        for p, master in stepped if self.state else self._pairs:
            self.state[p] = {"master": master, **self.inner.state[master]}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in SIXTEEN_BIT else tensor


def _master(parameter: Tensor) -> Tensor:
    return _wide(parameter.detach()).clone().requires_grad_(True)
