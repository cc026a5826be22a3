"""Frozen base model: no parameter trains. If the caller adds a task head and trains it, this is linear probing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedModel, linear_layers
from reference.spec import ReferenceSpec

SPEC = ReferenceSpec(
    paper="no paper: the baseline of all methods",
)


@dataclass(frozen=True)
class Config:
    """The Method has no hyperparameters."""


class FrozenWeightsModel(AdaptedModel):
    """A model whose weights stay as they were loaded."""

    def tensors(self) -> dict[str, Tensor]:
        """Return an empty mapping, since the Method trains nothing. The caller may still train a head."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """Return an empty list, since the Method trains nothing."""
        return []


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> FrozenWeightsModel:
    """Freeze `model`. `layers` has every linear layer of the model. `generator` is not used."""
    model.requires_grad_(False)
    return FrozenWeightsModel(model, linear_layers(model))
