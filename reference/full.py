"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.spec import ReferenceSpec

SPEC = ReferenceSpec(
    paper="no paper: the upper baseline that adapters are measured against",
    trains_weights=True,
)


@dataclass(frozen=True)
class Config:
    """No hyperparameters."""


class Adapted:
    """A model whose every parameter trains; there is no adapter to merge or detach."""

    can_merge = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def tensors(self) -> dict[str, Tensor]:
        """Map each parameter's path to the parameter; one that two layers share (tied embeddings) has both paths."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def state(self) -> dict[str, Tensor]:
        """Return nothing: there is no adapter."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """List every parameter of the model."""
        return list(self.model.parameters())

    def regularizer(self) -> Tensor | None:
        """Return None: nothing is added to the loss."""
        return None

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """Return None: full fine-tuning leaves the optimizer to the caller."""
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
    """Let every parameter of `model` train."""
    model.requires_grad_(True)
    return Adapted(model)
