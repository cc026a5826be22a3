"""Frozen base model: no parameter trains. With a new task head, trained by the caller, this is linear probing."""

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
    """No hyperparameters."""


class FrozenWeightsModel(AdaptedModel):
    """A model as it was loaded."""

    def tensors(self) -> dict[str, Tensor]:
        """Return an empty mapping, since the Method trains nothing, even if the caller trains a head."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """Return an empty list, since the Method trains nothing."""
        return []


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> FrozenWeightsModel:
    """Freeze `model`. Nothing is drawn from `generator`."""
    model.requires_grad_(False)
    return FrozenWeightsModel(model, linear_layers(model))
