"""VeRA: layers that see the same input share its product with A."""

from __future__ import annotations

from typing import Any

from harness.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("vera", name="fused", dtypes=DTYPES)
def vera(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `vera_linear` to what `config.targets` names; config as `reference.vera.Config`.

    A layer over a base that is no plain nn.Linear computes as the reference does.
    """
    from harness.kernels.dropout import keep_mask
    from harness.kernels.lora_linear import is_plain
    from harness.kernels.vera_linear import SharedProjection, vera_linear
    from reference.vera import VeraLinear, attach

    class FusedVeraLinear(VeraLinear):
        shared: SharedProjection

        def forward(self, x: Any) -> Any:
            if not is_plain(self.base):
                return super().forward(x)
            mask = None
            if self.dropout.p and self.training:
                mask, kept = keep_mask(x, self.dropout.p)
                mask = mask / kept
            return vera_linear(
                x, self.base.weight, self.base.bias, self.A, self.B, self.b, self.d, mask, self.shared
            )  # fmt: skip

    adapted = attach(model, config, generator)
    shared = SharedProjection()
    for path in adapted.layers:
        layer: Any = adapted.layers[path]
        layer.__class__, layer.shared = FusedVeraLinear, shared
    return adapted
