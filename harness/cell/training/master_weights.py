"""Optimizers for weights of 16 bits: weights and moments are kept in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FIRST_LOSS_SCALE = 2.0**10
"""A power of two, so that scaling rounds nothing; it lifts gradients from 6e-11 into what float16 can hold."""


class Masters(torch.optim.Optimizer):
    """An optimizer over float32 copies (masters) of its parameters; after each step these are the rounded masters.

    In float16 AdamW's eps of 1e-8 is 0, and so is the square of a small gradient; in bfloat16 a step of a thousandth of a
    weight is lost to rounding. With float32 masters, as in mixed-precision training, none of that matters. What something
    else writes into a parameter between two steps is taken over. `state` holds the masters too, so that the memory ledger
    counts them.

    inner: a new optimizer over the parameters; it steps the masters from now on. loss_scale: what the loss is multiplied by
    before its backward pass and gradients are divided by, 1 where no parameter is float16 (`scales` is False). `relax`
    halves it; it never grows, so that a run stays easy to follow.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in inner.param_groups], dict(inner.defaults))
        self.inner = inner
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for group, of_masters in zip(self.param_groups, inner.param_groups, strict=True):
            of_masters["params"] = [_master(p) for p in group["params"]]
            self._pairs += zip(group["params"], of_masters["params"], strict=True)
        self.scales = any(p.dtype == torch.float16 for p, _ in self._pairs)
        self.loss_scale = FIRST_LOSS_SCALE if self.scales else 1.0

    def held(self, parameter: Tensor) -> Tensor:
        """Return a parameter as it is kept between steps: its master. A step may be too small to be seen in 16 bits."""
        return next((m.detach() for p, m in self._pairs if p is parameter), parameter.detach())

    def relax(self) -> bool:
        """If a gradient is infinite or NaN, halve the loss scale and say so; at a scale of 1 it is not ours to mend."""
        finite = [p.grad.isfinite().all() for p, _ in self._pairs if p.grad is not None]
        if self.loss_scale == 1.0 or not finite or bool(torch.stack(finite).all()):  # one wait for a GPU, not hundreds
            return False
        self.loss_scale /= 2
        return True

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's gradient in float32, its scale taken out."""
        return None if parameter.grad is None else _wide(parameter.grad) / self.loss_scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not used."""
        for group, of_masters in zip(self.param_groups, self.inner.param_groups, strict=True):
            of_masters["lr"] = group["lr"]  # the schedule writes to the outer groups
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
    return tensor.float() if tensor.dtype in HALVES else tensor


def _master(parameter: Tensor) -> Tensor:
    return _wide(parameter.detach()).clone().requires_grad_(True)
