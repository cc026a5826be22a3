"""`hf-peft`: the methods of HuggingFace peft, injected into the model in place."""

from __future__ import annotations

from typing import Any

from harness.registry import implements


@implements("lora", name="hf-peft", dtypes=("float64", "float32", "bfloat16", "float16"), requires=["peft"])
def lora(model: Any, config: Any, generator: Any) -> Any:
    """Inject peft's LoRA; config as `reference.lora.Config`. peft draws from torch's global generator, seeded here."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    peft_config = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.targets)
    )
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        inject_adapter_in_model(peft_config, model)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    return PeftLora(model, layers)


class PeftLora:
    """A model with peft's LoRA layers inside, behind the harness's seam. Names: `<path>.A` (R, D), `<path>.B` (E, R)."""

    can_merge = True

    def __init__(self, model: Any, layers: dict[str, Any]) -> None:
        self.model, self.layers = model, layers

    def tensors(self) -> dict[str, Any]:
        """Map canonical names to peft's own parameters."""
        return {
            f"{path}.{name}": weight
            for path, layer in self.layers.items()
            for name, weight in (
                ("A", layer.lora_A["default"].weight),
                ("B", layer.lora_B["default"].weight),
            )
        }

    def state(self) -> dict[str, Any]:
        """Return nothing: LoRA keeps nothing but what trains."""
        return {}

    def parameters(self) -> list[Any]:
        """List what trains."""
        return list(self.tensors().values())

    def regularizer(self) -> None:
        """Return None: nothing is added to the loss."""

    def optimizer(self, lr: float, weight_decay: float) -> None:
        """Return None: the caller chooses the optimizer."""

    def after_step(self, step: int) -> None:
        """Do nothing: LoRA has no schedule."""

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
