"""Wrapper of the Cell's optimizer for use by other libraries. It keeps them from saving or loading the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch


class UnsavedOptimizer(torch.optim.Optimizer):
    """A wrapper of the optimizer `inner`, with the same parameter groups and state. Saving and loading do nothing.

    accelerate saves the state of each optimizer and loads it again. This would cast float32 masters and 8-bit codes to the
    dtype of the parameters.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the wrapped optimizer `inner`."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer `inner`."""
        return self.inner.state

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict, so that nothing is saved."""
        return {}

    def load_state_dict(self, state_dict: Any) -> None:
        """Ignore the state, because nothing was saved."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of `inner`. `closure` is not used."""
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        self.inner.zero_grad(set_to_none=set_to_none)
