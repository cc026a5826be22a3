"""LoRA: the low-rank term enters the memory of the base's product."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("lora", name="fused", dtypes=DTYPES)
def lora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `lora_linear` to what `config.targets` names; config as `reference.lora.Config`."""
    from torch import nn

    from harness.kernels.dropout import keep_mask
    from harness.kernels.lora_linear import lora_linear_over
    from reference.lora import LoraLinear, attach

    class FusedLoraLinear(LoraLinear):
        def forward(self, x: Any) -> Any:
            mask, kept = keep_mask(x, self.dropout.p) if self.dropout.p and self.training else (None, 1.0)
            return lora_linear_over(self.base, x, self.A, self.B, self.scaling / kept, mask)

    adapted = attach(model, config, generator)
    for path, layer in adapted.layers.items():
        if type(layer) is not LoraLinear or not isinstance(layer.base, nn.Linear):
            raise Unsupported(f"{path} is a {type(layer.base).__name__}; only linear layers have a faster path")
        layer.__class__ = FusedLoraLinear  # the same layer, computed otherwise
    return adapted
