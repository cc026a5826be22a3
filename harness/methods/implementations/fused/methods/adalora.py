"""AdaLoRA, computed as LoRA with A scaled by lambda. The importance averages of all layers are updated together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.kernels.torch.adalora_importance import adalora_importance_
from harness.kernels.torch.support.orthogonality import orthogonality
from harness.kernels.torch.support.shared_input import link
from harness.methods.implementations.fused.methods.lora import FusedLowRankLayer
from reference import adalora


class FusedAdaLoraLinear(FusedLowRankLayer, adalora.AdaLoraLinear):
    """AdaLoRA's layer, computed as a fused LoRA layer with A scaled by lambda."""

    def left_factor(self) -> Tensor:
        """Return the matrix by which x is multiplied first: the singular values times Q, shape (R, D)."""
        return self.A * self.E


class FusedAdaLora(adalora.AdaLoraAdapted):
    """A model with AdaLoRA that updates the importance averages of all layers together."""

    def observe(self) -> None:
        """Update every layer's importance with the current gradients."""
        tensors: dict[str, Any] = {}
        for letter in ("A", "E", "B"):
            tensors[letter] = [layer.tensors()[letter] for layer in self.adalora.values()]
            tensors[f"grad_{letter}"] = [w.grad for w in tensors[letter]]
            for average, name in (("I", "exp_avg_ipt"), ("U", "exp_avg_unc")):
                buffers = [layer.get_buffer(f"{name}_{letter}") for layer in self.adalora.values()]
                tensors[f"{average}_{letter}"] = buffers
        adalora_importance_(**tensors, beta1=self.config.beta1, beta2=self.config.beta2)

    def regularizer(self) -> Tensor | None:
        """Return the term gamma R(P, Q) of the loss over all layers (eq. 4 of AdaLoRA). If gamma is 0, return None."""
        if self.config.orthogonality == 0:
            return None
        P, Q = [layer.B for layer in self.adalora.values()], [layer.A for layer in self.adalora.values()]
        return self.config.orthogonality * orthogonality(P, Q, self.config.regularization)


def attach(model: nn.Module, config: adalora.Config, generator: torch.Generator) -> adalora.AdaLoraAdapted:
    """Attach AdaLoRA to `config.targets`. A convolution computes as the reference does."""
    adapted = adalora.attach(model, config, generator)
    linear = {path: one for path, one in adapted.adalora.items() if not isinstance(one, adalora.AdaLoraConv)}
    for layer in linear.values():
        layer.__class__ = FusedAdaLoraLinear
    link(linear)
    adapted.__class__ = FusedAdaLora
    return adapted
