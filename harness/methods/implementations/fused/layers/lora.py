"""LoRA's linear layer."""

from __future__ import annotations

from torch import Tensor

from harness.kernels.torch.lora_linear import lora_linear_over
from harness.kernels.torch.lora_linears import LoraFactors, factors_over
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.support.shared_input import SharedInputLayer
from reference.lora import LoraLinear


class FusedLoraLinear(SharedInputLayer, LoraLinear):
    """Compute by `lora_linear`; without dropout, together with layers of the same input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + scaling B A x, shape (..., E)."""
        if self.training and self.dropout.p:
            mask, kept = keep_mask(x, self.dropout.p)
            return lora_linear_over(self.base, x, self.A, self.B, self.scaling / kept, mask)
        return self.input_group(self, x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the output without sharing work with other layers."""
        return lora_linear_over(self.base, x, self.A, self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the factors of the output, or None if the base layer must be called."""
        return factors_over(self.base, x, self.A, self.B, self.scaling)
