"""VeRA; layers with the same input share its product with A."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.registry import implements

if TYPE_CHECKING:
    from torch import Generator, nn

    from harness.methods.spec import Adapted
    from reference.vera import Config
DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("vera", name="fused", dtypes=DTYPES)
def vera(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Attach layers that compute by `vera_linear` to `config.targets`; over a quantised base they equal the reference's."""
    from harness.kernels.torch.vera_linear import SharedProjection
    from harness.methods.implementations.fused.layers.vera import FusedVeraLinear
    from reference.vera import attach

    adapted = attach(model, config, generator)
    shared = SharedProjection()
    for path in adapted.layers:
        layer: Any = adapted.layers[path]
        layer.__class__, layer.shared = FusedVeraLinear, shared
    return adapted
