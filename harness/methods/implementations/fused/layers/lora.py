"""LoRA's linear layer."""

from __future__ import annotations

from torch import Tensor

from harness.kernels.torch.lora_linear import lora_linear_over
from harness.kernels.torch.lora_linears import LoraFactors, factors_over
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.support.shared_input import SharedInputLayer
from reference.lora import LoraLinear


class FusedLoraLinear(SharedInputLayer, LoraLinear):
    """Computes by `lora_linear`, and together with other layers of its input where nothing is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + scaling B A x, shape (..., E)."""
        if self.training and self.dropout.p:
            mask, kept = keep_mask(x, self.dropout.p)
            return lora_linear_over(self.base, x, self.A, self.B, self.scaling / kept, mask)
        return self.input_group(self, x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the same without the other layers of the input."""
        return lora_linear_over(self.base, x, self.A, self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return what the output is made of, or None where the base has to be called."""
        return factors_over(self.base, x, self.A, self.B, self.scaling)
