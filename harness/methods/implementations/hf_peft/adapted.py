"""Functions that attach peft's layers to a model, and `PeftAdapted`, the model with these layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
ADAPTER = "default"
"""Name of the attached adapter in peft. It is a part of the names of the adapter's parameters."""

_MARKS = {"Linear4bit": "is_loaded_in_4bit", "Linear8bitLt": "is_loaded_in_8bit"}
"""Class of bitsandbytes' layer -> attribute by which transformers marks a model with such layers."""

NamedTensors = Callable[[Any], dict[str, Any]]
"""A function that takes one of peft's layers, and maps letters of the paper to tensors of this layer."""


def has_conv1d(found: Mapping[str, nn.Module]) -> bool:
    """Return whether any layer is a Conv1D. If so, peft's config must set fan_in_fan_out, or peft warns and sets it."""
    from reference.shared.layers import kind_of

    return any(kind_of(layer) == "Conv1D" for layer in found.values())


def dense_targets(model: nn.Module, names: tuple[str, ...], method: str) -> dict[str, nn.Linear]:
    """Return the target layers by path, for a method of peft that needs dense weights.

    Raises Unsupported for a quantised layer, and ValueError if a target is not a linear layer.
    """
    from torch import nn

    from reference.shared.layers import targets

    found = targets(model, names)
    for path, base in found.items():
        if type(base) is not nn.Linear:
            kind = type(base).__name__
            raise Unsupported(f"{path}: peft's {method} needs a dense weight, and that of {kind} is packed")
    return found


def tuner(model: nn.Module, peft_config: Any, generator: Generator) -> Any:
    """Attach the adapter of `peft_config` to `model` and return peft's tuner."""
    return peft_model(model, peft_config, generator).base_model


def peft_model(model: nn.Module, peft_config: Any, generator: Generator, name: str = ADAPTER) -> Any:
    """Attach the adapter of `peft_config` to `model` and return peft's wrapper of the model.

    peft draws from torch's global generator, which is seeded here and restored.
    """
    import torch
    from peft import get_peft_model

    with torch.random.fork_rng(), _marked(model):
        torch.manual_seed(generator.initial_seed())
        return get_peft_model(model, peft_config, adapter_name=name)


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Set the attribute `is_loaded_in_4bit` or `is_loaded_in_8bit` of a model with such layers inside the context.

    transformers sets it, too. Otherwise peft would treat a Linear4bit as an nn.Linear.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    marks = [name for kind, name in _MARKS.items() if kind in kinds and not hasattr(model, name)]
    for name in marks:
        setattr(model, name, True)
    try:
        yield
    finally:
        for name in marks:
            delattr(model, name)


def attach_after_wider_adapter(model: nn.Module, peft_config: Any, generator: Generator) -> None:
    """Attach an adapter of twice the rank to `model`, then the adapter of `peft_config`, which becomes the active one."""
    import torch

    first_config = copy.deepcopy(peft_config)
    first_config.r *= 2
    wrapper = peft_model(model, first_config, generator, name="other")
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        wrapper.add_adapter(ADAPTER, peft_config)
    wrapper.set_adapter(ADAPTER)


def wrappers(layer: Any) -> list[Any]:
    """Return peft's layers at one path: several nested ones for stacked experts, the innermost first; otherwise one."""
    inside = layer.base_layer
    return [*(wrappers(inside) if hasattr(inside, "base_layer") else ()), layer]


class PeftAdapted:
    """A model with peft's layers. Tensors are named `<path>.<letter of the paper>`.

    Subclasses override `regularizer` and `after_step` where their method needs them.
    """

    trains: NamedTensors
    """Function that returns the trainable tensors of a layer."""
    frozen: NamedTensors
    """Function that returns the frozen tensors of a layer."""

    can_merge = True

    def __init__(self, model: nn.Module, trains: NamedTensors, frozen: NamedTensors = lambda _: {}) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model, self.trains, self.frozen = model, trains, frozen
        layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        self.layers: dict[str, Any] = {path: one for path, one in layers.items() if not path.endswith(".base_layer")}

    def tensors(self) -> dict[str, Tensor]:
        """Map `<path>.<letter of the paper>` to the trainable tensors, which are peft's own parameters."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in self.trains(layer).items()}

    def state(self) -> dict[str, Tensor]:
        """Map `<path>.<name>` to the Method's frozen tensors: peft's own tensors, or views of them."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in self.frozen(layer).items()}

    def parameters(self) -> list[Tensor]:
        """List the parameters that train."""
        return list(self.tensors().values())

    def regularizer(self) -> Tensor | None:
        """Return None: nothing is added to the loss."""
        return None

    def optimizer(self, lr: float, weight_decay: float) -> None:
        """Return None: the caller chooses the optimizer."""

    def after_step(self, step: int) -> None:
        """Do nothing: there is no schedule."""

    def merge(self) -> None:
        """Merge as peft does: into the base weight, in place. A packed base is packed again, which adds a rounding error.

        Raises Unsupported for a bias of B (`lora_bias`) over a layer without a bias: peft cannot merge it.
        """
        for path, layer in self.layers.items():
            if any(getattr(layer, "lora_bias", {}).values()) and layer.get_base_layer().bias is None:
                raise Unsupported(f"{path}: peft cannot merge lora_bias into a layer without a bias")
        for layer in self.layers.values():
            for one in wrappers(layer):
                one.merge()

    def unmerge(self) -> None:
        """Unmerge as peft does: by subtracting the update or, for OFT, by multiplying by the inverse of the rotation."""
        for layer in self.layers.values():
            for one in wrappers(layer):
                one.unmerge()

    def bases(self) -> dict[str, nn.Module]:
        """Map the paths of the adapted layers to their base layers."""
        return {path: layer.get_base_layer() for path, layer in self.layers.items()}

    def detach(self) -> None:
        """Restore the base layers with their current weights, as peft's `unload` does."""
        from reference.shared.layers import replace

        for path, base in self.bases().items():
            replace(self.model, path, base)
        # Otherwise peft would treat the next adapter as a second one. `detach` may be called again.
        self.model.__dict__.pop("peft_config", None)
