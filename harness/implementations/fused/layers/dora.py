"""DoRA's linear layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.kernels.device import multiplied_by_triton
from harness.kernels.dora_linear import dora_linear, gained, row_norms
from harness.kernels.dropout import keep_mask
from harness.kernels.lora_linear import is_plain, lora_linear_over
from harness.kernels.lora_linears import LoraFactors, factors_over, lora_linears
from harness.kernels.nf4_linear import Nf4Linear
from harness.kernels.nf4_lora_linear import packed_lora_linear
from harness.kernels.siblings import Sibling
from reference.dora import DoraLinear


class FusedDoraLinear(Sibling, DoraLinear):
    """Computes by `dora_linear`; over our NF4 by the product with the low-rank term in it, and the gain."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + b + (g - 1) W0 x + g s B A x with g = m / ||W0 + s B A||, shape (..., E)."""
        base: Any = self.base
        plain, packed = is_plain(base), is_plain(base, Nf4Linear) and x.dtype == base.compute_dtype
        if not (plain or packed) or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        if self.training and self.dropout.p:
            if packed:
                return super().forward(x)
            mask, kept = keep_mask(x, self.dropout.p)
            return self._by_itself(x, mask / kept)
        if plain and multiplied_by_triton(x, self.A, self.B):
            return self._by_itself(x, None)
        W = base.packed_weight.lent(x.dtype) if packed else base.weight
        norm = row_norms(W, self.A, self.B, self.scaling)  # at once: what is lent the next call overwrites
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return gained(self.family(self, x), bias, self.m, norm)

    def _by_itself(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return dora_linear(x, self.base.weight, self.base.bias, self.A, self.B, self.m, self.scaling, mask)

    def alone(self, x: Tensor) -> Tensor:
        """Return the product without gain and bias."""
        base: Any = self.base
        if (factors := self.factors(x)) is not None:
            return lora_linears(x, [factors])[0]
        if is_plain(base, Nf4Linear):
            return packed_lora_linear(x, base.packed_weight, None, self.A, self.B, self.scaling, None)
        return lora_linear_over(base, x, self.A, self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return what the product without gain and bias is made of."""
        factors = factors_over(self.base, x, self.A, self.B, self.scaling)
        return None if factors is None else replace(factors, bias=None)
