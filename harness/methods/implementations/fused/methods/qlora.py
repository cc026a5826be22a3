"""QLoRA. The weight is decoded into memory that is reused, and the low-rank term is added in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.kernels.nf4_format import BLOCK2
from harness.kernels.torch.nf4_lora_linear import packed_lora_linear
from harness.kernels.torch.support.packed_weight import PackedWeight
from reference import qlora
from reference.shared.adapted import AdaptedLayers


class FusedQloraLinear(qlora.QloraLinear):
    """QLoRA's layer, computed by `packed_lora_linear`."""

    def _packed(self) -> PackedWeight:
        shape = self.base.out_features, self.base.in_features
        second = (self.absmax2, self.offset, BLOCK2) if self.two_levels else ()
        return PackedWeight(self.codes, self.absmax, self.block, shape, *second)

    def weight(self) -> Tensor:
        """Return the decoded weight in float32, shape (E, D)."""
        return self._packed().decoded(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + scaling (B A x + c) with the decoded W, shape (..., E)."""
        mask = None
        if self.dropout.p and self.training:
            mask = nn.functional.dropout(x.new_ones(x.shape), self.dropout.p)
        y = packed_lora_linear(x, self._packed(), self.base.bias, self.A, self.B, self.scaling, mask)
        return self.with_bias(y)


def attach(model: nn.Module, config: qlora.Config, generator: torch.Generator) -> AdaptedLayers:
    """Attach layers that compute by `packed_lora_linear` to `config.targets`.

    The original layers stay available for `detach`; a Cell offloads their weights while it trains.
    """
    adapted = qlora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedQloraLinear
    return adapted
