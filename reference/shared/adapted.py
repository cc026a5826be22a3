"""Results of `attach`: a model with adapted layers, or a model whose own weights train. Not a Method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference.shared.layers import as_stored, dense_copy, replace


class AdaptedModel:
    """A model to which a Method is attached. Without adapter layers, as here, there is nothing to merge or detach.

    A tensor's name is the path of the parameter in the model.
    """

    can_merge = False

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.layers: Mapping[str, nn.Module] = dict(layers)

    def tensors(self) -> dict[str, Tensor]:
        """Map names to the trainable tensors. A parameter that two layers share (tied embeddings) has two names."""
        return {n: p for n, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """Map names to tensors that the Method has created but does not train. Here, there are none."""
        return {}

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def regularizer(self) -> Tensor | None:
        """Return a scalar that the Method adds to the loss. Here, return None, because nothing is added."""
        return None

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """Return the Method's own optimizer. Here, return None, so that the caller chooses one."""
        return None

    def after_step(self, step: int) -> None:
        """Do what the Method does after optimizer step number `step`. Here, do nothing."""

    def merge(self) -> None:
        """Fold the adapter into the weights. Here, do nothing, because there is no adapter."""

    def unmerge(self) -> None:
        """Undo `merge`. Here, do nothing."""

    def detach(self) -> None:
        """Put back the layers that `attach` has replaced. Here, do nothing, because it has replaced none."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Map paths to the nn.Linear layers of a model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


class AdaptedLayer(nn.Module):
    """A layer that takes the place of `base` and applies a Method's update."""

    base: nn.Module
    """The original layer, which does not change. `detach` puts it back."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the paper's letters to the trainable parameters."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Map names to tensors that the Method has created but does not train. By default, there are none."""
        return {}

    def delta(self) -> Tensor:
        """Return the Method's change of the weight: a matrix (E, D), or in the shape of a kernel or of stacked experts."""
        raise NotImplementedError

    def dense_base(self) -> nn.Module:
        """Return a dense copy of the base, to which `merged` adds the update."""
        return dense_copy(self.base)

    def merged(self) -> Any:
        """Return a plain layer with the same output as this one: the base with `delta()` added to its weight."""
        dense: Any = self.dense_base()
        with torch.no_grad():
            dense.weight += as_stored(dense, self.delta()).to(dense.weight.dtype)
        return dense


class LowRankLayer(AdaptedLayer):
    """A layer with the update of LoRA, scaling B A. The factors A (R, D) and B (E, R) train.

    c: the bias of B, (E,), or None. It trains too, and the layer adds scaling c to its output.
    """

    def __init__(
        self, base: nn.Module, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0, c: Tensor | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.c = None if c is None else nn.Parameter(c)
        self.scaling, self.dropout = scaling, nn.Dropout(dropout)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the names A, B and, if B has a trainable bias, c to the trainable parameters."""
        return {"A": self.A, "B": self.B} | ({} if self.c is None else {"c": self.c})

    def with_bias(self, y: Tensor, dim: int = -1) -> Tensor:
        """Return y + scaling c in the dtype of y, or y itself if there is no c. dim: the dimension of the E outputs."""
        if self.c is None:
            return y
        added = (self.scaling * self.c).to(y.dtype)
        return y + added.view(-1, *[1] * (-1 - dim))

    def merged(self) -> Any:
        """Return a plain layer with the same output as this one. Its bias is that of the base plus scaling c."""
        dense = super().merged()
        if self.c is not None:
            add_bias(dense, self.scaling * self.c)
        return dense

    def delta(self) -> Tensor:
        """Return scaling B A, shape (E, D)."""
        return self.scaling * (self.B @ self.A)


def add_bias(layer: Any, vector: Tensor) -> None:
    """Add a vector (E,) to the bias of a plain layer, in place. If the layer has no bias, the vector becomes its bias."""
    added = vector.detach().to(layer.weight.dtype)
    layer.bias = nn.Parameter(added if layer.bias is None else layer.bias.detach() + added, requires_grad=False)


class AdaptedLayers(AdaptedModel):
    """A model in which adapted layers replace some layers. Tensors are named `<path of the layer>.<letter of the paper>`."""

    can_merge = True
    layers: dict[str, AdaptedLayer]

    def __init__(self, model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
        super().__init__(model, layers)

    def tensors(self) -> dict[str, Tensor]:
        """Map names to the trainable tensors."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in layer.tensors().items()}

    def state(self) -> dict[str, Tensor]:
        """Map names to tensors that the Method has created but does not train."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in layer.state().items()}

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters that train."""
        return [t for layer in self.layers.values() for t in layer.tensors().values()]

    def merge(self) -> None:
        """Replace each adapted layer by a plain layer with the same output. What is merged already stays as it is."""
        for path, layer in self.layers.items():
            if self.model.get_submodule(path) is layer:
                replace(self.model, path, layer.merged())

    def unmerge(self) -> None:
        """Put back the adapted layers. This is exact, because `merge` leaves the base layers unchanged."""
        for path, layer in self.layers.items():
            replace(self.model, path, layer)

    def detach(self) -> None:
        """Put back the base layers in place of the adapted layers."""
        for path, layer in self.layers.items():
            replace(self.model, path, layer.base)


def adapt(model: nn.Module, bases: Mapping[str, nn.Module], make: Callable[[nn.Module], AdaptedLayer]) -> AdaptedLayers:
    """Freeze `model`, and replace each layer in `bases` by the adapted layer that `make` returns for it.

    bases: path -> layer of `model`. If `make` raises ValueError, raise it again with the path, and leave `model` unchanged.
    """
    layers = {}
    for path, base in bases.items():
        try:
            layers[path] = make(base)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    model.requires_grad_(False)
    for path, layer in layers.items():
        replace(model, path, layer)
    return AdaptedLayers(model, layers)
