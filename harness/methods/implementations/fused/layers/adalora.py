"""AdaLoRA's linear layer, and its model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harness.kernels.torch.adalora_importance import adalora_importance_
from harness.kernels.torch.lora_linear import lora_linear_over
from harness.kernels.torch.lora_linears import LoraFactors, factors_over
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.support.orthogonality import orthogonality
from harness.kernels.torch.support.shared_input import SharedInputLayer
from reference.adalora import AdaLoraAdapted, AdaLoraLinear


class FusedAdaLoraLinear(SharedInputLayer, AdaLoraLinear):
    """Compute as the fused LoRA, with A scaled by lambda."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + scaling P Lambda Q x, shape (..., E)."""
        if self.training and self.dropout.p:
            mask, kept = keep_mask(x, self.dropout.p)
            return lora_linear_over(self.base, x, self.A * self.E, self.B, self.scaling / kept, mask)
        return self.input_group(self, x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the output without sharing work with other layers."""
        return lora_linear_over(self.base, x, self.A * self.E, self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the factors of the output, or None if the base layer must be called."""
        return factors_over(self.base, x, self.A * self.E, self.B, self.scaling)


class FusedAdaLora(AdaLoraAdapted):
    """Update the averages of all layers together."""

    def observe(self) -> None:
        """Update every layer's importance with the current gradients."""
        given: dict[str, Any] = {}
        for letter in ("A", "E", "B"):
            given[letter] = [layer.tensors()[letter] for layer in self.adalora.values()]
            given[f"grad_{letter}"] = [w.grad for w in given[letter]]
            for average, name in (("I", "exp_avg_ipt"), ("U", "exp_avg_unc")):
                given[f"{average}_{letter}"] = [layer.get_buffer(f"{name}_{letter}") for layer in self.adalora.values()]
        adalora_importance_(**given, beta1=self.config.beta1, beta2=self.config.beta2)

    def regularizer(self) -> Tensor | None:
        """Return gamma R(P, Q) over all layers (eq. 4), or None if gamma is 0."""
        if self.config.orthogonality == 0:
            return None
        P, Q = [layer.B for layer in self.adalora.values()], [layer.A for layer in self.adalora.values()]
        return self.config.orthogonality * orthogonality(P, Q, self.config.regularization)
