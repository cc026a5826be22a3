"""LoRA with the low-rank term added in place to the base's product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.errors import Unsupported
from harness.kernels.torch.lora_linear import lora_linear_over
from harness.kernels.torch.lora_linears import LoraFactors, factors_over
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.support.shared_input import SharedInputLayer, link
from reference import lora
from reference.shared.adapted import AdaptedLayers


class FusedLowRankLayer(SharedInputLayer):
    """A low-rank layer, computed by `lora_linear`.

    Without dropout, layers with the same input are computed together.
    """

    A: nn.Parameter
    B: nn.Parameter
    dropout: nn.Dropout

    def left_factor(self) -> Tensor:
        """Return the matrix (R, D) by which x is multiplied first."""
        return self.A

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + scaling B A x, shape (..., E)."""
        if self.training and self.dropout.p:
            mask, share = keep_mask(x, self.dropout.p)
            return lora_linear_over(self.base, x, self.left_factor(), self.B, self.scaling / share, mask)
        return self.input_group(self, x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the output, shape (..., E), without sharing work with other layers."""
        return lora_linear_over(self.base, x, self.left_factor(), self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the matrices from which the output is computed, or None if the base layer must be called."""
        return factors_over(self.base, x, self.left_factor(), self.B, self.scaling)


class FusedLoraLinear(FusedLowRankLayer, lora.LoraLinear):
    """LoRA's layer."""


def attach(model: nn.Module, config: lora.Config, generator: torch.Generator) -> AdaptedLayers:
    """Attach layers that compute by `lora_linear` to `config.targets`. Raises Unsupported if a target is not linear."""
    adapted = lora.attach(model, config, generator)
    for path, layer in adapted.layers.items():
        if type(layer) is not lora.LoraLinear or not isinstance(layer.base, nn.Linear):
            adapted.detach()
            raise Unsupported(f"{path} is a {type(layer.base).__name__}; the fused LoRA supports linear layers only")
    for layer in adapted.layers.values():
        layer.__class__ = FusedLoraLinear  # the state stays the same; only the forward pass differs
    link(adapted.layers)
    return adapted
