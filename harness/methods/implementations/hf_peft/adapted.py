"""Put peft's layers into a model, and stand between them and the harness's seam."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DTYPES = ("float64", "float32", "bfloat16", "float16")
ADAPTER = "default"
"""peft's name for the adapter that is judged; its parameters stand under it."""

Named = Callable[[Any], dict[str, Any]]
"""Maps one of peft's layers to tensors by the paper's letters."""


def tuner(model: Any, peft_config: Any, generator: Any) -> Any:
    """Put what `peft_config` describes into `model` and return peft's tuner, which holds it."""
    return peft_model(model, peft_config, generator).base_model


def peft_model(model: Any, peft_config: Any, generator: Any, name: str = ADAPTER) -> Any:
    """Put what `peft_config` describes into `model` and return peft's model around it.

    peft draws from torch's global generator, which is seeded here and put back.
    """
    import torch
    from peft import get_peft_model

    with torch.random.fork_rng(), _marked(model):
        torch.manual_seed(generator.initial_seed())
        return get_peft_model(model, peft_config, adapter_name=name)


@contextmanager
def _marked(model: Any) -> Iterator[None]:
    """Mark a model with 4-bit layers as transformers does; without, peft takes a Linear4bit for an nn.Linear."""
    packed = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    if not packed or hasattr(model, "is_loaded_in_4bit"):
        yield
        return
    model.is_loaded_in_4bit = True
    try:
        yield
    finally:
        del model.is_loaded_in_4bit


def second(model: Any, peft_config: Any, generator: Any) -> None:
    """Put an adapter of twice the rank into `model`, then what `peft_config` describes beside it, and activate that."""
    import torch

    other = copy.deepcopy(peft_config)
    other.r *= 2
    both = peft_model(model, other, generator, name="other")
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        both.add_adapter(ADAPTER, peft_config)
    both.set_adapter(ADAPTER)


class PeftAdapted:
    """A model with peft's layers inside, behind the harness's seam. Names: `<path>.<the paper's letter>`.

    trains, frozen: what of one of peft's layers trains, and what the method made beside that. A method that adds to the
    loss or acts between steps overrides what is empty here.
    """

    can_merge = True

    def __init__(self, model: Any, trains: Named, frozen: Named = lambda _: {}) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model, self.trains, self.frozen = model, trains, frozen
        self.layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    def tensors(self) -> dict[str, Any]:
        """Map canonical names to peft's own parameters."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in self.trains(layer).items()}

    def state(self) -> dict[str, Any]:
        """Map canonical names to peft's own tensors, or to views of them."""
        return {f"{path}.{name}": t for path, layer in self.layers.items() for name, t in self.frozen(layer).items()}

    def parameters(self) -> list[Any]:
        """List what trains."""
        return list(self.tensors().values())

    def regularizer(self) -> Any:
        """Return None: nothing is added to the loss."""
        return None

    def optimizer(self, lr: float, weight_decay: float) -> None:
        """Return None: the caller chooses the optimizer."""

    def after_step(self, step: int) -> None:
        """Do nothing: there is no schedule."""

    def merge(self) -> None:
        """Merge as peft does: into the base weight, in place; a 4-bit base is packed again, which loses a little."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Unmerge as peft does: by subtraction."""
        for layer in self.layers.values():
            layer.unmerge()

    def detach(self) -> None:
        """Put peft's base layers back, as its `unload` does: with the weights that they have by then."""
        from reference.shared.layers import replace

        for path, layer in self.layers.items():
            replace(self.model, path, layer.base_layer)
        # Or peft would take the next adapter for a second one. Who measures may put layers back and detach again.
        self.model.__dict__.pop("peft_config", None)
