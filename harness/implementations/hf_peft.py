"""`hf-peft`: the methods of HuggingFace peft, injected into the model in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")
ADAPTER = "default"
"""peft's name for the only adapter that we add; its parameters stand under it."""


@implements("lora", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def lora(model: Any, config: Any, generator: Any) -> Any:
    """Inject peft's LoRA into linear layers, Conv1D, embeddings and convolutions; config as `reference.lora.Config`.

    Raises ValueError for a convolution with conv=loralib, a parametrisation that peft does not have.
    """
    from peft import LoraConfig

    from reference.layers import KINDS, kind_of, targets

    kinds = {path: kind_of(layer) for path, layer in targets(model, config.targets, KINDS).items()}
    if config.conv != "peft" and "Conv2d" in kinds.values():
        path = next(path for path, kind in kinds.items() if kind == "Conv2d")
        raise ValueError(f"{path}: peft's LoRA of a convolution is conv=peft, not conv={config.conv}")
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        use_rslora=config.rslora,
        # What a user of GPT-2 sets. peft sets it by itself otherwise, layer by layer, and warns of it.
        fan_in_fan_out="Conv1D" in kinds.values(),
    )
    return inject(model, peft_config, generator, lora_tensors)


def inject(model: Any, peft_config: Any, generator: Any, tensors_of: Callable[[Any], dict[str, Any]]) -> PeftAdapted:
    """Inject what `peft_config` describes. peft draws from torch's global generator, which is seeded here and put back.

    tensors_of: maps one of peft's layers to its trainable parameters by the paper's letters.
    """
    import torch
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return PeftAdapted(model, layers, tensors_of)


def lora_tensors(layer: Any) -> dict[str, Any]:
    """Map A and B to peft's own parameters of a LoRA layer of any kind.

    Linear and Conv1D: A (R, D), B (E, R). Embedding: A (R, num), B (dim, R). Conv2d: A (R, in, k, k), B (out, R/groups, 1,
    1). The reference has the same layouts.
    """
    if ADAPTER in layer.lora_embedding_A:
        return {"A": layer.lora_embedding_A[ADAPTER], "B": layer.lora_embedding_B[ADAPTER]}
    return {"A": layer.lora_A[ADAPTER].weight, "B": layer.lora_B[ADAPTER].weight}


class PeftAdapted:
    """A model with peft's layers inside, behind the harness's seam. Names: `<path>.<the paper's letter>`.

    tensors_of: maps one of peft's layers to its trainable parameters. A method that keeps frozen tensors, adds to the
    loss or acts between steps overrides what is empty here.
    """

    can_merge = True

    def __init__(self, model: Any, layers: dict[str, Any], tensors_of: Callable[[Any], dict[str, Any]]) -> None:
        self.model, self.layers, self.tensors_of = model, layers, tensors_of

    def tensors(self) -> dict[str, Any]:
        """Map canonical names to peft's own parameters."""
        return {
            f"{path}.{name}": t for path, layer in self.layers.items() for name, t in self.tensors_of(layer).items()
        }

    def state(self) -> dict[str, Any]:
        """Return nothing: nothing is kept but what trains."""
        return {}

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
        """Put peft's base layers back."""
        from reference.layers import replace

        for path, layer in self.layers.items():
            replace(self.model, path, layer.base_layer)
