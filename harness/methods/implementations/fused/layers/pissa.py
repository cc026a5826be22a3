"""PiSSA's linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.kernels.torch.lora_linear import lora_linear
from harness.kernels.torch.lora_linears import LoraFactors
from harness.kernels.torch.support.shared_input import SharedInputLayer
from reference.pissa import PissaLinear


class FusedPissaLinear(SharedInputLayer, PissaLinear):
    """Compute by `lora_linear` over the residual."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W_res x + b + scaling B A x, shape (..., E)."""
        if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        return self.input_group(self, x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the output without sharing work with other layers."""
        return lora_linear(x, self.get_buffer("residual"), self.base.bias, self.A, self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the factors of the output."""
        return LoraFactors(self.get_buffer("residual"), self.base.bias, self.A, self.B, self.scaling)
