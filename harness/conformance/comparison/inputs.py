"""Inputs and incoming gradients for one layer of any kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.comparison.magnitudes import vary
from harness.conformance.subject import DTYPES

HALF = 0.5
"""Factor that changes an adapter or an argument: a power of two, so that nothing is rounded."""
SIDE = 5
IMAGES = 2
"""SIDE: height and width of a convolution's input images. IMAGES: their usual number. Each pixel is a token."""


def inputs(
    base: nn.Module,
    tokens: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    magnitude: str = "normal",
    images: int = IMAGES,
) -> tuple[Tensor, Tensor]:
    """Return an input x and an incoming gradient dy for `base`, drawn in float64 so that every dtype sees the same numbers.

    Linear: (T, D) and (T, E). Embedding: token numbers (T,) and (T, dim). Conv2d: at most `images` images (N, C, H, W).
    magnitude: magnitude of x, see `magnitudes.vary`.
    """
    layer: Any = base
    if isinstance(base, nn.Embedding):
        x = torch.randint(0, layer.num_embeddings, (tokens,), generator=generator)
        dy = torch.randn(tokens, layer.embedding_dim, generator=generator, dtype=torch.float64)
        return x.to(layer.weight.device), dy.to(layer.weight.device, dtype)
    if isinstance(base, nn.Conv2d):
        x = torch.randn(min(tokens, images), layer.in_channels, SIDE, SIDE, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            shape = base(x[:1].to(layer.weight.device, layer.weight.dtype)).shape
        dy = torch.randn(len(x), *shape[1:], generator=generator, dtype=torch.float64)
    else:
        D, E = features(base)
        x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
        dy = torch.randn(tokens, E, generator=generator, dtype=torch.float64)
    device = next(base.parameters()).device
    return vary(x, magnitude, dtype).to(device, dtype), dy.to(device, dtype)


def cast(x: Tensor, dtype: str) -> Tensor:
    """Return x in `dtype`, or x itself if it holds token numbers."""
    return x.to(DTYPES[dtype]) if x.is_floating_point() else x


def features(base: nn.Module) -> tuple[int, int]:
    """Return (D, E) of a linear layer. transformers' Conv1D stores the transposed weight."""
    layer: Any = base
    if isinstance(base, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.weight.shape[0], layer.weight.shape[1]


def takes_rows(base: nn.Module) -> bool:
    """Return whether the layer maps rows of features to rows of features, with any leading dimensions."""
    return not isinstance(base, nn.Embedding | nn.Conv2d)
