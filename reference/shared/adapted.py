"""What `attach` returns where a Method wraps layers: the wrapped layers, what trains, how they merge. Not a Method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from reference.shared.layers import replace


class AdaptedLayer(Protocol):
    """A module that stands in the place of a base layer."""

    @property
    def base(self) -> nn.Module:
        """The untouched layer under it, which `detach` puts back."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the paper's letters to what trains."""

    def state(self) -> dict[str, Tensor]:
        """Map names to what the Method made beside that and does not train; often empty."""

    def merged(self) -> nn.Module:
        """Return a plain layer that computes the same."""


class Adapted:
    """A model whose layers at some paths are wrapped. Names are `<path of the layer>.<the paper's letter>`."""

    can_merge = True

    def __init__(self, model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
        self.model, self.layers = model, dict(layers)

    def tensors(self) -> dict[str, Tensor]:
        """Map canonical names to the trainable tensors."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in layer.tensors().items()}

    def state(self) -> dict[str, Tensor]:
        """Map canonical names to the frozen tensors of the Method's own."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in layer.state().items()}

    def parameters(self) -> list[nn.Parameter]:
        """List what trains."""
        return [t for layer in self.layers.values() for t in layer.tensors().values()]

    def regularizer(self) -> Tensor | None:
        """Return None: nothing is added to the loss."""
        return None

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """Return None: the optimizer is the caller's choice."""
        return None

    def after_step(self, step: int) -> None:
        """Do nothing: there is no schedule."""

    def merge(self) -> None:
        """Put a plain layer that computes the same in the place of each adapted one."""
        for path, layer in self.layers.items():
            replace(self.model, path, layer.merged())

    def unmerge(self) -> None:
        """Take the adapted layers back; the base was never touched, so this is exact."""
        for path, layer in self.layers.items():
            replace(self.model, path, layer)  # type: ignore[arg-type]  # the Protocol cannot say that it is a Module

    def detach(self) -> None:
        """Put the untouched base layers back."""
        for path, layer in self.layers.items():
            replace(self.model, path, layer.base)
