"""Return value of `attach` for an adapter whose layers replace layers of the model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plain_torch.layers import Layers
from plain_torch.targets import select


class AdapterLayer(nn.Module):
    """Layer beside a frozen base layer. Its own parameters train, and its own buffers are its state."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.train(base.training)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by the names that the paper gives them."""
        return dict(self.named_parameters(recurse=False))

    def kept(self) -> dict[str, Tensor]:
        """Return the tensors that do not train, but belong to the adapter."""
        return dict(self.named_buffers(recurse=False))

    def merged(self) -> nn.Module:
        """Return a plain layer with the same output."""
        raise NotImplementedError


class Adapted:
    """A model with adapter layers in the place of some of its layers."""

    can_merge = True

    def __init__(self, model: nn.Module, layers: dict[str, Any]) -> None:
        self.model, self.layers = model, layers
        self._merged = False
        model.requires_grad_(False)
        for layer in layers.values():
            for parameter in layer.trained().values():
                parameter.requires_grad_(True)
        self._put(lambda layer: layer)

    def _put(self, chosen: Callable[[Any], nn.Module]) -> None:
        """Put a module for each adapter layer into the model, in the mode of the module that is there now."""
        for path, layer in self.layers.items():
            mode = self.model.get_submodule(path).training
            self.model.set_submodule(path, chosen(layer).train(mode))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that train."""
        return {
            f"{path}.{name}": value for path, layer in self.layers.items() for name, value in layer.trained().items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that do not train but must be saved."""
        return {f"{path}.{name}": value for path, layer in self.layers.items() for name, value in layer.kept().items()}

    def parameters(self) -> list[Tensor]:
        """Return the tensors that train, as a list."""
        return list(self.tensors().values())

    def regularizer(self) -> Tensor | None:
        """Return the term that the trainer adds to the loss: none."""
        return None

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """Leave the choice of the optimizer to the trainer."""
        return None

    def after_step(self, step: int) -> None:
        """Do nothing after an optimizer step."""

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the adapter layers by plain ones, unless they are replaced already."""
        if not self._merged:
            self._put(lambda layer: layer.merged())
            self._merged = True

    def unmerge(self) -> None:
        """Put the adapter layers back."""
        if self._merged:
            self._put(lambda layer: layer)
            self._merged = False

    def detach(self) -> None:
        """Put the base layers back."""
        self._put(lambda layer: layer.base)
        self._merged = False


def replace(
    model: nn.Module, targets: Iterable[str], kinds: Iterable[str], make: Callable[[nn.Module], AdapterLayer]
) -> dict[str, AdapterLayer]:
    """Make an adapter layer for every target. The model stays as it is."""
    bases: Layers = select(model, targets, kinds)
    return {path: make(base) for path, base in bases.items()}
