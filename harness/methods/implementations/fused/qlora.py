"""QLoRA: the weight is decoded into memory that is used again, and the low-rank term enters the product's memory."""

from __future__ import annotations

from typing import Any

from harness.methods.registry import implements


@implements("qlora", name="fused", dtypes=("float64", "float32", "bfloat16", "float16"))
def qlora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `packed_lora_linear` to what `config.targets` names; config as `reference.qlora.Config`.

    The original layers are kept for `detach`; a Cell sets their weights aside while it trains.
    """
    from harness.methods.implementations.fused.layers.qlora import FusedQloraLinear
    from reference.qlora import attach

    adapted = attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedQloraLinear  # the same layer, computed otherwise
    return adapted
