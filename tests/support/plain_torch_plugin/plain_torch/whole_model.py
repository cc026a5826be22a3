"""Methods without an adapter: every weight trains, or none."""

from typing import Any

import torch
from torch import Tensor, nn

from plain_torch.layers import Layers, kind_of


class WholeModel:
    """A model that stays as it is, and of which some parameters train."""

    can_merge = False

    def __init__(self, model: nn.Module, layers: Layers, names: list[str]) -> None:
        self.model, self.layers, self.names = model, layers, names
        model.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that train; a shared one has each of its names."""
        return {name: self.model.get_parameter(name) for name in self.names}

    def state(self) -> dict[str, Tensor]:
        """Return nothing: there is no other state."""
        return {}

    def parameters(self) -> list[Tensor]:
        """Return each tensor that trains once."""
        return list({id(tensor): tensor for tensor in self.tensors().values()}.values())

    def regularizer(self) -> Tensor | None:
        """Return the term that the trainer adds to the loss: none."""
        return None

    def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> torch.optim.Optimizer | None:
        """Leave the choice of the optimizer to the trainer."""
        return None

    def after_step(self, step: int) -> None:
        """Do nothing after an optimizer step."""

    def merge(self) -> None:
        """Do nothing: there is no adapter."""

    unmerge = detach = merge


def linear_layers(model: nn.Module) -> Layers:
    """Return every linear layer of a model."""
    return {path: module for path, module in model.named_modules() if kind_of(module) == "linear"}


def attach_full(model: nn.Module, config: Any, generator: Any) -> WholeModel:
    """Make every parameter trainable."""
    return WholeModel(model, linear_layers(model), [name for name, _ in model.named_parameters(remove_duplicate=False)])


def attach_frozen(model: nn.Module, config: Any, generator: Any) -> WholeModel:
    """Freeze the model."""
    return WholeModel(model, linear_layers(model), [])
