"""LoRA: the low-rank term enters the memory of the base's product."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.methods.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("lora", name="fused", dtypes=DTYPES)
def lora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `lora_linear` to what `config.targets` names; config as `reference.lora.Config`."""
    from torch import nn

    from harness.kernels.torch.support.shared_input import link
    from harness.methods.implementations.fused.layers.lora import FusedLoraLinear
    from reference.lora import LoraLinear, attach

    adapted = attach(model, config, generator)
    for path, layer in adapted.layers.items():
        if type(layer) is not LoraLinear or not isinstance(layer.base, nn.Linear):
            adapted.detach()
            raise Unsupported(f"{path} is a {type(layer.base).__name__}; only linear layers have a faster path")
    for layer in adapted.layers.values():
        layer.__class__ = FusedLoraLinear  # the same layer, computed otherwise
    link(adapted.layers)
    return adapted
