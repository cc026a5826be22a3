"""VeRA's linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.kernels.torch.lora_linear import is_plain
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.vera_linear import SharedProjection, vera_linear
from reference.vera import VeraLinear


class FusedVeraLinear(VeraLinear):
    """Computes by `vera_linear`. shared: where the layers of a model look for the product with A."""

    shared: SharedProjection

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + Lambda_b B Lambda_d A x, shape (..., E)."""
        if not is_plain(self.base) or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        mask = None
        if self.dropout.p and self.training:
            mask, kept = keep_mask(x, self.dropout.p)
            mask = mask / kept
        return vera_linear(x, self.base.weight, self.base.bias, self.A, self.B, self.b, self.d, mask, self.shared)
