"""QLoRA with the weight decoded into reused memory and the low-rank term added in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Generator, nn

    from harness.methods.spec import Adapted
    from reference.qlora import Config


@implements("qlora", name="fused", dtypes=("float64", "float32", "bfloat16", "float16"))
def qlora(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Attach layers that compute by `packed_lora_linear` to `config.targets`.

    The original layers stay available for `detach`; a Cell offloads their weights while it trains.
    """
    from harness.methods.implementations.fused.layers.qlora import FusedQloraLinear
    from reference.qlora import attach

    adapted = attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedQloraLinear  # same state, other forward pass
    return adapted
