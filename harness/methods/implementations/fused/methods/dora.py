"""DoRA, computed as one product that includes the low-rank term, then multiplied by a gain per output.

Let W0 and b be the base's weight and bias, s the scaling, g the gain, and d the input x after dropout. The reference
computes W0 x + b + (g - 1) W0 d + g s B A d. This file computes W0 (x - d) + b + g (W0 d + s B A d). If W0 and s B A
nearly cancel, they cancel in the accumulator of one product, before rounding. If g is 1 and B is 0, the output equals
the base's output within rounding, but not to the last bit. A dropout probability near 1 makes d large, so digits are
lost.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from harness.errors import Unsupported
from harness.kernels.device import multiplied_by_triton
from harness.kernels.torch.dora_linear import dora_linear, gained, row_norms
from harness.kernels.torch.lora_linear import is_plain, lora_linear_over
from harness.kernels.torch.lora_linears import LoraFactors, factors_over, lora_linears
from harness.kernels.torch.nf4_linear import Nf4Linear, packed_linear
from harness.kernels.torch.nf4_lora_linear import packed_lora_linear
from harness.kernels.torch.support.dropout import keep_mask
from harness.kernels.torch.support.shared_input import SharedInputLayer, link
from reference import dora
from reference.shared.adapted import AdaptedLayers
from reference.shared.layers import LINEAR_OR_CONV1D, dense_weight, kind_of, targets


class FusedDoraLinear(SharedInputLayer, dora.DoraLinear):
    """DoRA's layer, computed by `dora_linear`, or by one product W0 x + s B A x that `gained` multiplies by g.

    Unlike the reference, the layer saves no decoded copy of a 4-bit weight for the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 x + b + (g - 1) W0 d + g s B A d with g = m / ||W0 + s B A||, shape (..., E).

        W0 and b are the base's weight and bias, s is the scaling, m has the magnitudes, and d is x after dropout.
        """
        base: Any = self.base
        plain, packed = is_plain(base), is_plain(base, Nf4Linear) and x.dtype == base.compute_dtype
        if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        if not (plain or packed):
            by_calls = isinstance(base, nn.Linear) and type(base) is not nn.Linear and is_plain(base, type(base))
            return self._by_calls(x) if by_calls else super().forward(x)
        drops = self.training and self.dropout.p
        if plain and (drops or multiplied_by_triton(x, self.A, self.B)):
            mask = self._mask(x) if drops else None
            return dora_linear(x, base.weight, base.bias, self.A, self.B, self.m, self.scaling, mask)
        W = base.packed_weight.in_buffer(x.dtype) if packed else base.weight
        norm = row_norms(W, self.A, self.B, self.scaling)  # computed before the next call, which overwrites the buffer
        bias = None if base.bias is None else base.bias.to(x.dtype)
        if not drops:
            return gained(self.input_group(self, x), bias, self.m, norm)
        dropped = x * self._mask(x)
        z = packed_lora_linear(dropped, base.packed_weight, None, self.A, self.B, self.scaling, None)
        return gained(z, packed_linear(x - dropped, base.packed_weight, bias), self.m, norm)

    def _mask(self, x: Tensor) -> Tensor:
        mask, share = keep_mask(x, self.dropout.p)
        return mask / share

    def _by_calls(self, x: Tensor) -> Tensor:
        """Compute the output by the reference's formula, but let the base layer multiply by its weight.

        Each call of the base layer decodes the weight.
        """
        base: Any = self.base
        g = dora.gain(self.m, row_norms(dense_weight(base), self.A, self.B, self.scaling))
        y: Tensor = base(x)
        dropped = self.dropout(x) if self.training and self.dropout.p else x
        W0_d = y if base.bias is None and dropped is x else _without_bias(base, dropped)
        return y + (g - 1) * W0_d + g * self.scaling * linear(linear(dropped, self.A), self.B)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the product W0 x + s B A x, without gain and bias. No work is shared with other layers."""
        base: Any = self.base
        if (factors := self.factors(x)) is not None:
            return lora_linears(x, [factors])[0]
        if is_plain(base, Nf4Linear):
            return packed_lora_linear(x, base.packed_weight, None, self.A, self.B, self.scaling, None)
        return lora_linear_over(base, x, self.A, self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the matrices from which `lora_linears` computes W0 x + s B A x.

        Return None if `factors_over` returns None, e.g. because the base layer must be called.
        """
        factors = factors_over(self.base, x, self.A, self.B, self.scaling)
        return None if factors is None else replace(factors, bias=None)


def _without_bias(base: Any, x: Tensor) -> Tensor:
    """Return W0 x, computed by the base layer without its bias. Subtracting the bias afterwards would add a rounding."""
    bias, base.bias = base.bias, None
    try:
        y: Tensor = base(x)
    finally:
        base.bias = bias
    return y


def attach(model: nn.Module, config: dora.Config, generator: torch.Generator) -> AdaptedLayers:
    """Replace each target by a layer that computes by `dora_linear`.

    Raises Unsupported for per=input, for embeddings and convolutions, and for detach_norm=false. A layer over a Conv1D
    computes as the reference does. A layer over a base that another library has quantised also uses the formula of the
    reference, but calls the base layer instead of multiplying by the decoded weight.
    """
    if config.per != "output" or not config.detach_norm:
        raise Unsupported("the fused DoRA supports per=output with detach_norm=true only")
    for path, base in targets(model, config.targets, dora.KINDS).items():
        if kind_of(base) not in LINEAR_OR_CONV1D:
            raise Unsupported(f"{path} is a {type(base).__name__}; the fused DoRA supports linear layers only")
    adapted = dora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedDoraLinear
    link(adapted.layers)
    return adapted
