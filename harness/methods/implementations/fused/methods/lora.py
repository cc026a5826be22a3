"""LoRA with the low-rank term added in place to the base's product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.errors import Unsupported
from harness.kernels.torch.lora_linear import lora_linear_over
from harness.kernels.torch.lora_linears import LoraFactors, factors_over
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.support.shared_input import SharedInputLayer, link
from harness.methods.implementations.fused.experts import FusedLoraExperts, why_not
from reference import lora
from reference.lora_experts import LoraExperts
from reference.shared.adapted import AdaptedLayers
from reference.shared.layers import KINDS, kind_of, targets


class FusedLowRankLayer(SharedInputLayer):
    """A low-rank layer, computed by the kernels of `lora_linear`.

    Without dropout, layers with the same input are computed together where `InputGroup` can do so.
    """

    A: nn.Parameter
    B: nn.Parameter
    dropout: nn.Dropout

    def left_factor(self) -> Tensor:
        """Return the matrix (R, D) by which x is multiplied first."""
        return self.A

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + scaling B A x, shape (..., E). Dropout applies to the second x only."""
        if self.training and self.dropout.p:
            mask, share = keep_mask(x, self.dropout.p)
            return lora_linear_over(self.base, x, self.left_factor(), self.B, self.scaling / share, mask)
        return self.input_group(self, x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the output, shape (..., E), without sharing work with other layers."""
        return lora_linear_over(self.base, x, self.left_factor(), self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the matrices from which `lora_linears` computes the output, or None if `factors_over` returns None."""
        return factors_over(self.base, x, self.left_factor(), self.B, self.scaling)


class FusedLoraLinear(FusedLowRankLayer, lora.LoraLinear):
    """LoRA's layer. The kernels do not know the bias c of B, so scaling c is added to their output."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + scaling (B A x + c), shape (..., E)."""
        return self.with_bias(super().forward(x))


def attach(model: nn.Module, config: lora.Config, generator: torch.Generator) -> AdaptedLayers:
    """Replace each linear target by a FusedLoraLinear, and each module of experts by a FusedLoraExperts.

    Raises Unsupported for other kinds of targets, for experts whose class does not use transformers' interface for
    experts, and for experts with a norm after every expert.
    """
    for path, base in targets(model, config.targets, KINDS).items():
        if problem := _why_not(base):
            raise Unsupported(f"{path} is a {type(base).__name__}; {problem}")
    adapted = lora.attach(model, config, generator)
    linear = {}
    for path, layer in adapted.layers.items():  # the state stays; only the forward pass differs
        if isinstance(layer, LoraExperts):
            layer.__class__ = FusedLoraExperts
        else:
            layer.__class__ = FusedLoraLinear
            linear[path] = layer
    link(linear)
    return adapted


def _why_not(base: nn.Module) -> str:
    """Return why `fused` cannot compute LoRA for a layer, or an empty string."""
    if kind_of(base) == "experts":
        return why_not(base)
    return "" if kind_of(base) == "linear" else "the fused LoRA supports linear layers and stacked experts only"
