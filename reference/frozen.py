"""The frozen base model: nothing of it trains. With a new task head, which the caller trains, this is linear probing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.spec import ReferenceSpec

SPEC = ReferenceSpec(
    paper="no paper: the baseline every method is measured against",
)


@dataclass(frozen=True)
class Config:
    """No hyperparameters."""


class Adapted:
    """A model as it was loaded."""

    can_merge = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: nothing trains."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return nothing: there is no adapter."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """Return nothing: nothing trains."""
        return []

    def regularizer(self) -> Tensor | None:
        """Return None: nothing is added to the loss."""
        return None

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """Return None: there is nothing to optimise."""
        return None

    def after_step(self, step: int) -> None:
        """Do nothing."""

    def merge(self) -> None:
        """Do nothing: there is no adapter."""

    def unmerge(self) -> None:
        """Do nothing: there is no adapter."""

    def detach(self) -> None:
        """Do nothing: there is no adapter."""


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> Adapted:
    """Freeze `model`."""
    model.requires_grad_(False)
    return Adapted(model)
