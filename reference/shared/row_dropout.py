"""Rank dropout of LoHa and LoKr, which drops rows of the update. Not a Method."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowDropout(nn.Module):
    """Dropout of whole rows of an update (E, D). A row is one output feature, dropped for all tokens of a call.

    p: probability that a row is dropped in training mode. The rows that remain are divided by the fraction of rows that
    remain, so that the mean of the mask is 1. If no row remains, the update is zero.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, delta_ED: Tensor) -> Tensor:
        """Return the update (E, D), in training mode with rows dropped."""
        if not self.training or not self.p:
            return delta_ED
        kept_E = torch.rand(len(delta_ED), dtype=torch.float32, device=delta_ED.device) >= self.p
        share = kept_E.double().mean().clamp(min=1 / len(delta_ED))
        return delta_ED * (kept_E / share).to(delta_ED.dtype)[:, None]
