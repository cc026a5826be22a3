"""DoRA: one product with the low-rank term in it, and a gain for each output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.errors import Unsupported
from harness.registry import implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("dora", name="fused", dtypes=DTYPES)
def dora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `dora_linear` to what `config.targets` names; config as `reference.dora.Config`.

    Raises Unsupported for a magnitude per input and for a norm with a gradient. A layer over a base that is neither a plain
    nn.Linear nor our own in NF4 computes as the reference does; so does the latter with dropout.
    """
    import torch

    from harness.kernels.device import by_triton
    from harness.kernels.dora_linear import dora_linear, gained, row_norms
    from harness.kernels.dropout import keep_mask
    from harness.kernels.lora_linear import is_plain, lora_linear
    from harness.kernels.lora_linears import factors_over, lora_linears
    from harness.kernels.nf4_linear import Nf4Linear
    from harness.kernels.siblings import Family, meet
    from reference.dora import DoraLinear, attach

    if config.per != "output" or not config.detach_norm:
        raise Unsupported("the fused DoRA has a magnitude per output, and takes the norm for a constant")

    class FusedDoraLinear(DoraLinear):
        family: Family

        def forward(self, x: Any) -> Any:
            plain, packed = is_plain(self.base), is_plain(self.base, Nf4Linear) and x.dtype == self.base.compute_dtype
            if not (plain or packed) or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
                return super().forward(x)
            if self.training and self.dropout.p:
                if packed:
                    return super().forward(x)
                mask, kept = keep_mask(x, self.dropout.p)
                return self._by_itself(x, mask / kept)
            if plain and by_triton(x, self.A, self.B):
                return self._by_itself(x, None)
            base: Any = self.base
            W = base.packed_weight.lent(x.dtype) if packed else base.weight
            norm = row_norms(W, self.A, self.B, self.scaling)  # at once: what is lent the next call overwrites
            bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
            z = self.family(self, x)
            return gained(z, bias, self.m, norm)

        def _by_itself(self, x: Any, mask: Any) -> Any:
            return dora_linear(x, self.base.weight, self.base.bias, self.A, self.B, self.m, self.scaling, mask)

        def alone(self, x: Any) -> Any:
            if (factors := self.factors(x)) is None:
                return lora_linear(x, self.base.weight, None, self.A, self.B, self.scaling)
            return lora_linears(x, [factors])[0]

        def factors(self, x: Any) -> Any:
            """Return what the product without gain and bias is made of."""
            factors = factors_over(self.base, x, self.A, self.B, self.scaling)
            return None if factors is None else replace(factors, bias=None)

        def held(self) -> Any:
            return self.A, self.B, self.base.weight

    adapted = attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedDoraLinear
    meet(adapted.layers)
    return adapted
