"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedModel, linear_layers
from reference.spec import ReferenceSpec

SPEC = ReferenceSpec(
    paper="no paper: the upper baseline of adapters",
    trains_weights=True,
)


@dataclass(frozen=True)
class Config:
    """The Method has no hyperparameters."""


class FullModel(AdaptedModel):
    """A model in which every parameter trains."""

    def tensors(self) -> dict[str, Tensor]:
        """Map paths to the parameters. A parameter that two layers share (tied embeddings) has two paths."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def parameters(self) -> list[nn.Parameter]:
        """List every parameter of the model once, also one that two layers share."""
        return list(self.model.parameters())


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> FullModel:
    """Make every parameter of `model` trainable. `layers` has every linear layer of the model. `generator` is not used."""
    model.requires_grad_(True)
    return FullModel(model, linear_layers(model))
