"""AdaLoRA: the layers compute as LoRA's do with A scaled by lambda, and the averages of all are carried on together."""

from __future__ import annotations

from typing import Any

from harness.methods.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("adalora", name="fused", dtypes=DTYPES)
def adalora(model: Any, config: Any, generator: Any) -> Any:
    """Attach AdaLoRA to what `config.targets` names; config as `reference.adalora.Config`."""
    from harness.kernels.torch.support.shared_input import link
    from harness.methods.implementations.fused.layers.adalora import FusedAdaLora, FusedAdaLoraLinear
    from reference.adalora import attach

    adapted = attach(model, config, generator)
    for layer in adapted.adalora.values():
        layer.__class__ = FusedAdaLoraLinear
    link(adapted.adalora)
    adapted.__class__ = FusedAdaLora
    return adapted
