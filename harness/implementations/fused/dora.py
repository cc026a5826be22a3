"""DoRA: one product with the low-rank term in it, and a gain for each output."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("dora", name="fused", dtypes=DTYPES)
def dora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `dora_linear` to what `config.targets` names; config as `reference.dora.Config`.

    Raises Unsupported for a magnitude per input and for a norm with a gradient. A layer over a base that is no plain
    nn.Linear computes as the reference does.
    """
    from harness.kernels.dora_linear import dora_linear
    from harness.kernels.dropout import keep_mask
    from harness.kernels.lora_linear import is_plain
    from reference.dora import DoraLinear, attach

    if config.per != "output" or not config.detach_norm:
        raise Unsupported("the fused DoRA has a magnitude per output, and takes the norm for a constant")

    class FusedDoraLinear(DoraLinear):
        def forward(self, x: Any) -> Any:
            if not is_plain(self.base):
                return super().forward(x)
            mask = None
            if self.dropout.p and self.training:
                mask, kept = keep_mask(x, self.dropout.p)
                mask = mask / kept
            return dora_linear(x, self.base.weight, self.base.bias, self.A, self.B, self.m, self.scaling, mask)

    adapted = attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedDoraLinear
    return adapted
