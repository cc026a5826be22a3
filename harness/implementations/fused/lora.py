"""LoRA: the low-rank term enters the memory of the base's output."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.registry import implements


@implements("lora", name="fused", dtypes=("float64", "float32", "bfloat16", "float16"))
def lora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `lora_linear` to what `config.targets` names; config as `reference.lora.Config`."""
    from torch import nn

    from harness.kernels.lora_linear import lora_linear
    from reference.lora import LoraLinear, attach

    class FusedLoraLinear(LoraLinear):
        def forward(self, x: Any) -> Any:
            if self.dropout.p and self.training:
                dropped = nn.functional.dropout(x, self.dropout.p)
                return self.base(x) + self.scaling * ((dropped @ self.A.T) @ self.B.T)
            return lora_linear(self.base, x, self.A, self.B, self.scaling)

    adapted = attach(model, config, generator)
    for path, layer in adapted.layers.items():
        if type(layer) is not LoraLinear or not isinstance(layer.base, nn.Linear):
            raise Unsupported(f"{path} is a {type(layer.base).__name__}; only linear layers have a faster path")
        layer.__class__ = FusedLoraLinear  # the same layer, computed otherwise
    return adapted
