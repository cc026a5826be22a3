"""LoRA with the low-rank term added in place to the base's product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import Unsupported
from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Generator, nn

    from harness.methods.spec import Adapted
    from reference.lora import Config
DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("lora", name="fused", dtypes=DTYPES)
def lora(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Attach layers that compute by `lora_linear` to `config.targets`. Raises Unsupported for other than linear layers."""
    from torch import nn

    from harness.kernels.torch.support.shared_input import link
    from harness.methods.implementations.fused.layers.lora import FusedLoraLinear
    from reference.lora import LoraLinear, attach

    adapted = attach(model, config, generator)
    for path, layer in adapted.layers.items():
        if type(layer) is not LoraLinear or not isinstance(layer.base, nn.Linear):
            adapted.detach()
            raise Unsupported(f"{path} is a {type(layer.base).__name__}; the fused LoRA supports linear layers only")
    for layer in adapted.layers.values():
        layer.__class__ = FusedLoraLinear  # same state, other forward pass
    link(adapted.layers)
    return adapted
