"""VeRA. By `SharedProjection`, layers with the same input may share the product of this input with A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.kernels.torch.lora_linear import is_plain
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.vera_linear import SharedProjection, vera_linear
from reference import vera
from reference.shared.adapted import AdaptedLayers


class FusedVeraLinear(vera.VeraLinear):
    """VeRA's layer, computed by `vera_linear`."""

    shared: SharedProjection
    """Cache of an input's product with A. All layers of a model share it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + Lambda_b B Lambda_d A x, shape (..., E).

        Lambda_b and Lambda_d are the diagonal matrices of the vectors b and d.
        """
        base: Any = self.base
        if not is_plain(base) or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        mask = None
        if self.dropout.p and self.training:
            mask, share = keep_mask(x, self.dropout.p)
            mask = mask / share
        return vera_linear(x, base.weight, base.bias, self.A, self.B, self.b, self.d, mask, self.shared)


def attach(model: nn.Module, config: vera.Config, generator: torch.Generator) -> AdaptedLayers:
    """Attach VeRA to `config.targets`.

    Layers over a dense base compute by `vera_linear`. Over a quantised base or a Conv1D they compute as the reference does.
    """
    adapted = vera.attach(model, config, generator)
    shared = SharedProjection()
    layers: dict[str, Any] = adapted.layers
    for layer in layers.values():
        layer.__class__, layer.shared = FusedVeraLinear, shared
    return adapted
