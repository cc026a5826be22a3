"""QLoRA: the weight is decoded into memory that is used again, and the low-rank term enters the product's memory."""

from __future__ import annotations

from typing import Any

from harness.registry import implements


@implements("qlora", name="fused", dtypes=("float64", "float32", "bfloat16", "float16"))
def qlora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `packed_lora_linear` to what `config.targets` names; config as `reference.qlora.Config`.

    The original layers are kept for `detach`, so memory is to be measured with `lora` on a base in `nf4`, not here.
    """
    import torch
    from torch import nn

    from harness.kernels.nf4 import BLOCK2
    from harness.kernels.nf4_lora_linear import packed_lora_linear
    from harness.kernels.packed_weight import PackedWeight
    from reference.qlora import QloraLinear, attach

    class FusedQloraLinear(QloraLinear):
        def _packed(self) -> PackedWeight:
            shape = self.base.out_features, self.base.in_features
            second = (self.absmax2, self.offset, BLOCK2) if self.two_levels else ()
            return PackedWeight(self.codes, self.absmax, self.block, shape, *second)

        def weight(self) -> Any:
            return self._packed().decoded(torch.float32)

        def forward(self, x: Any) -> Any:
            mask = None
            if self.dropout.p and self.training:
                mask = nn.functional.dropout(x.new_ones(x.shape), self.dropout.p)
            return packed_lora_linear(x, self._packed(), self.base.bias, self.A, self.B, self.scaling, mask)

    adapted = attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedQloraLinear  # the same layer, computed otherwise
    return adapted
