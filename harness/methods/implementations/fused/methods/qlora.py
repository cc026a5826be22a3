"""QLoRA. Weights are decoded into memory that is reused, and the low-rank term is added in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.errors import Unsupported
from harness.kernels.torch.nf4_lora_linear import packed_lora_linear
from harness.methods.implementations.fused.experts import FusedQloraExperts, packed_weight, why_not
from reference import qlora
from reference.lora_experts import QloraExperts
from reference.shared.adapted import AdaptedLayers
from reference.shared.layers import kind_of, targets


class FusedQloraLinear(qlora.QloraLinear):
    """QLoRA's layer, computed by `packed_lora_linear`."""

    def weight(self) -> Tensor:
        """Return the decoded weight in float32, shape (E, D)."""
        return packed_weight(self.packed).decoded(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + scaling (B A x + c) with the decoded W and the bias c of B, shape (..., E)."""
        mask = None
        if self.dropout.p and self.training:
            mask = nn.functional.dropout(x.new_ones(x.shape), self.dropout.p)
        y = packed_lora_linear(x, packed_weight(self.packed), self.base.bias, self.A, self.B, self.scaling, mask)
        return self.with_bias(y)


def attach(model: nn.Module, config: qlora.Config, generator: torch.Generator) -> AdaptedLayers:
    """Replace each linear target by a FusedQloraLinear, and each module of experts by a FusedQloraExperts.

    The original layers stay available for `detach`; a Cell offloads their weights while it trains. Raises Unsupported for
    experts whose class does not use transformers' interface for experts, and for experts with a norm after every expert.
    """
    for path, base in targets(model, config.targets, qlora.KINDS).items():
        if kind_of(base) == "experts" and (problem := why_not(base)):
            raise Unsupported(f"{path} is a {type(base).__name__}; {problem}")
    adapted = qlora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedQloraExperts if isinstance(layer, QloraExperts) else FusedQloraLinear
    return adapted
