"""VeRA: layers that see the same input share its product with A."""

from __future__ import annotations

from typing import Any

from harness.methods.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("vera", name="fused", dtypes=DTYPES)
def vera(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `vera_linear` to what `config.targets` names; config as `reference.vera.Config`.

    A layer over a base that is no plain nn.Linear computes as the reference does.
    """
    from harness.kernels.torch.vera_linear import SharedProjection
    from harness.methods.implementations.fused.layers.vera import FusedVeraLinear
    from reference.vera import attach

    adapted = attach(model, config, generator)
    shared = SharedProjection()
    for path in adapted.layers:
        layer: Any = adapted.layers[path]
        layer.__class__, layer.shared = FusedVeraLinear, shared
    return adapted
