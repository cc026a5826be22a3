"""AdaLoRA as LoRA with A scaled by lambda; the averages of all layers are updated together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Generator, nn

    from harness.methods.spec import Adapted
    from reference.adalora import Config
DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("adalora", name="fused", dtypes=DTYPES)
def adalora(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Attach AdaLoRA to `config.targets`."""
    from harness.kernels.torch.support.shared_input import link
    from harness.methods.implementations.fused.layers.adalora import FusedAdaLora, FusedAdaLoraLinear
    from reference.adalora import attach

    adapted = attach(model, config, generator)
    for layer in adapted.adalora.values():
        layer.__class__ = FusedAdaLoraLinear
    link(adapted.adalora)
    adapted.__class__ = FusedAdaLora
    return adapted
