"""PiSSA without a full SVD. The low-rank term is added in place to the residual's product.

For a weight in float32 or a narrower dtype, the exact SVD (niter = 0) comes from the eigenvectors of the smaller Gram
matrix in float64. The squared singular values are then as precise as the values of an SVD in float32. LAPACK computes
the SVD of a float64 weight, and of a weight whose requested singular values span more than a factor of 2^12.

The randomised SVD (niter > 0) begins with the same sketch as the reference. It computes bases by Cholesky factorisation
in float64 if the columns are far from linearly dependent. Otherwise it uses Householder reflections, like the reference.
The two ways give bases of the same space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.kernels.torch.lora_linear import lora_linear
from harness.kernels.torch.lora_linears import LoraFactors
from harness.kernels.torch.support.range_finder import leading_svd, randomised_svd
from harness.kernels.torch.support.shared_input import SharedInputLayer, link
from reference import pissa
from reference.shared.adapted import AdaptedLayers


class FusedPissaLinear(SharedInputLayer, pissa.PissaLinear):
    """PiSSA's layer, computed by `lora_linear` over the residual."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W_res x + b + scaling B A x with the residual W_res and the bias b, shape (..., E)."""
        if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        return self.input_group(self, x)

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return the output without sharing work with other layers."""
        return lora_linear(x, self.get_buffer("residual"), self.base.bias, self.A, self.B, self.scaling)

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the matrices from which `lora_linears` computes the output."""
        return LoraFactors(self.get_buffer("residual"), self.base.bias, self.A, self.B, self.scaling)


def attach(model: nn.Module, config: pissa.Config, generator: torch.Generator) -> AdaptedLayers:
    """Replace each target by a layer that computes by `lora_linear` over the residual.

    Raises ValueError in the same cases as the reference.
    """
    adapted = pissa.attach(model, config, generator, split)
    linear = {path: layer for path, layer in adapted.layers.items() if isinstance(layer, pissa.PissaLinear)}
    for layer in linear.values():
        layer.__class__ = FusedPissaLinear  # the state stays the same; only the forward pass differs
    link(linear)
    return adapted


def split(
    W_ED: Tensor, config: pissa.Config, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A (R, D), B (E, R), residual (E, D)) in `dtype`, as `reference.pissa.split` does."""
    W = W_ED.to(torch.promote_types(W_ED.dtype, torch.float32))
    scaling = config.alpha / config.rank
    if config.niter:
        U, S, V = randomised_svd(W, pissa.sketch(W, config.rank, generator), config.niter)
    else:
        U, S, V = leading_svd(W, config.rank)
    U, Vt = pissa.signed(U, V.T)
    root = (S / scaling).sqrt()
    A, B = (root[:, None] * Vt).to(dtype).contiguous(), (U * root).to(dtype).contiguous()
    return A, B, torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=-scaling).to(dtype)
