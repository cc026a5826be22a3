"""`fused`: our own optimised paths from `harness/kernels`, attached to models.

Only the computation is ours: which layers are adapted, their initial state, and merging are the reference's.
"""

from __future__ import annotations

from typing import Any

from harness.registry import implements


@implements("lora", name="fused", dtypes=("float64", "float32", "bfloat16", "float16"))
def lora(model: Any, config: Any, generator: Any) -> Any:
    """Attach FusedLoraLinear to the layers that `config.targets` names; config as `reference.lora.Config`."""
    from harness.kernels.lora_linear import FusedLoraLinear
    from reference.layers import replace
    from reference.lora import Adapted, attach

    plain = attach(model, config, generator)
    layers: dict[str, Any] = {
        path: FusedLoraLinear(o.base, o.A, o.B, o.scaling, config.dropout) for path, o in plain.layers.items()
    }
    for path, layer in layers.items():
        replace(model, path, layer)
    return Adapted(model, layers)
