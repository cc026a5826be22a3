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
    from harness.kernels.lora_linears import factors_over
    from harness.kernels.siblings import Family, meet
    from reference.lora import LoraLinear, attach

    class FusedLoraLinear(LoraLinear):
        family: Family

        def forward(self, x: Any) -> Any:
            if self.training and self.dropout.p:
                mask, kept = keep_mask(x, self.dropout.p)
                return lora_linear_over(self.base, x, self.A, self.B, self.scaling / kept, mask)
            return self.family(self, x)

        def alone(self, x: Any) -> Any:
            return lora_linear_over(self.base, x, self.A, self.B, self.scaling)

        def factors(self, x: Any) -> Any:
            return factors_over(self.base, x, self.A, self.B, self.scaling)

        def held(self) -> Any:
            return self.A, self.B, self.base.weight

    adapted = attach(model, config, generator)
    for path, layer in adapted.layers.items():
        if type(layer) is not LoraLinear or not isinstance(layer.base, nn.Linear):
            raise Unsupported(f"{path} is a {type(layer.base).__name__}; only linear layers have a faster path")
        layer.__class__ = FusedLoraLinear  # the same layer, computed otherwise
    meet(adapted.layers)
    return adapted
