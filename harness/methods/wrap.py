"""Replacement of a model's layers by layers of a third party, for `harness.testing.wrap_layers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import Unsupported
from reference.shared.adapted import AdaptedLayers
from reference.shared.layers import KINDS, dense_copy, kind_of, replace, targets


def wrap(
    model: nn.Module,
    config: Any,
    make_layer: Callable[[nn.Linear], nn.Module],
    names: Mapping[str, str] | None,
    update: Callable[[Any], Tensor] | None,
) -> AdaptedLayers:
    """Freeze `model`, replace every target by `make_layer(target)`, and return the adapted model.

    names: letter of the paper -> attribute of a new layer; None takes the names of its own parameters. update: function
    that returns what a layer adds to the weight; None if the layers cannot be merged. Raises Unsupported for a target
    that is not a linear layer.
    """
    bases = targets(model, config.targets, KINDS)
    for path, base in bases.items():
        if kind_of(base) != "linear":
            raise Unsupported(f"layer {path} is not linear; its class is {type(base).__name__}")
    model.requires_grad_(False)
    layers = {path: make_layer(base) for path, base in bases.items()}
    for path, layer in layers.items():
        replace(model, path, layer)
    return WrappedLayers(model, bases, layers, names, update)


class WrappedLayers(AdaptedLayers):
    """A model in which modules of a third party replace some layers."""

    def __init__(
        self,
        model: nn.Module,
        bases: Mapping[str, nn.Linear],
        layers: Mapping[str, Any],
        names: Mapping[str, str] | None,
        update: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__(model, layers)
        self.bases, self.names, self.update = dict(bases), names, update
        self.can_merge = update is not None

    def tensors(self) -> dict[str, Tensor]:
        """Map `<path>.<letter of the paper>` to the Parameters of the third party's layers."""
        tensors: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            own = [name for name, _ in layer.named_parameters(recurse=False)]  # type: ignore[attr-defined]
            for letter, attribute in (self.names or {name: name for name in own}).items():
                tensors[f"{path}.{letter}"] = getattr(layer, attribute)
        return tensors

    def state(self) -> dict[str, Tensor]:
        """Return an empty dict, so that the harness compares no frozen tensors of the third party's layers."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters that train."""
        return list(self.tensors().values())  # type: ignore[arg-type]  # the layers' Parameters, as tensors

    @torch.no_grad()
    def merge(self) -> None:
        """Replace each layer by a plain linear layer with the updated weight.

        Raises Unsupported if there is no `update` function.
        """
        if self.update is None:
            raise Unsupported(
                "pass wrap_layers the argument `update`, a function that returns what a layer adds to the weight"
            )
        for path, layer in self.layers.items():
            if self.model.get_submodule(path) is not layer:
                continue  # what is merged already stays as it is
            dense = dense_copy(self.bases[path])
            dense.weight += self.update(layer).to(dense.weight.dtype)
            replace(self.model, path, dense)

    def detach(self) -> None:
        """Restore the base layers."""
        for path, base in self.bases.items():
            replace(self.model, path, base)
