"""Inputs and incoming gradients (gradients of the output) for one layer of any kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.comparison.magnitudes import vary
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import DTYPES
from reference.shared.layers import Convolution, device_of, kind_of

HALF = 0.5
"""Factor by which checks change an adapter or an argument. It is a power of two, so that nothing is rounded."""
_FEW = 20_000
"""Smallest number of elements with which a layer, or the arguments of an Operation, count as large."""
SIDE = 5
IMAGES = 2
"""SIDE is the length of each side of the images that a convolution gets: one side for nn.Conv1d, three for nn.Conv3d.
IMAGES is the usual number of images. Each pixel counts as a token, so two images with two sides have 50 tokens."""


def inputs(
    base: nn.Module,
    tokens: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    magnitude: str = "normal",
    images: int = IMAGES,
) -> tuple[Tensor, Tensor]:
    """Return an input x and an incoming gradient dy for the layer `base`.

    Every dtype gets the same numbers. A linear layer gets x (T, D) and dy (T, E). An embedding gets token numbers (T,)
    and dy (T, dim). If the embedding has a padding entry and T is above 1, the last token is the padding entry. A
    convolution gets at most `images` images, e.g. (N, C, H, W). Stacked experts get x and dy (T, D). magnitude: size of
    the numbers in x, such as `large`; `magnitudes.vary` lists the names.
    """
    layer: Any = base
    if isinstance(base, nn.Embedding):
        x = torch.randint(0, layer.num_embeddings, (tokens,), generator=generator)
        if layer.scale_grad_by_freq:
            x[1::2] = x[: len(x) // 2 * 2 : 2]  # an entry that occurs twice gets another gradient
        if layer.padding_idx is not None:
            x[1:][-1:] = layer.padding_idx
        dy = normal_noise((tokens, layer.embedding_dim), generator)
        return x.to(layer.weight.device), dy.to(layer.weight.device, dtype)
    if isinstance(base, Convolution):
        sides = [SIDE] * len(base.kernel_size)
        x = normal_noise((min(tokens, images), layer.in_channels, *sides), generator)
        with torch.no_grad():
            shape = base(x[:1].to(layer.weight.device, layer.weight.dtype)).shape
        dy = normal_noise((len(x), *shape[1:]), generator)
    else:
        D, E = features(base)
        x = normal_noise((tokens, D), generator)
        dy = normal_noise((tokens, E), generator)
    device = device_of(base)
    return vary(x, magnitude, dtype).to(device, dtype), dy.to(device, dtype)


def is_large(tensors: Iterable[Tensor]) -> bool:
    """Return whether `tensors` have so many elements that checks should not repeat a call a hundred times."""
    return sum(t.numel() for t in tensors) >= _FEW


def cast(x: Tensor, dtype: str) -> Tensor:
    """Return x in `dtype`. If x holds token numbers, return x itself."""
    return x.to(DTYPES[dtype]) if x.is_floating_point() else x


def features(base: nn.Module) -> tuple[int, int]:
    """Return the numbers of input features and output features of a linear layer.

    The layer may also be transformers' Conv1D, which stores the transposed weight, or a module of stacked experts.
    """
    layer: Any = base
    if isinstance(base, nn.Linear):
        return layer.in_features, layer.out_features
    if kind_of(base) == "experts":
        return (layer.down_proj.shape[2 if layer.is_transposed else 1],) * 2
    return layer.weight.shape[0], layer.weight.shape[1]


def takes_rows(base: nn.Module) -> bool:
    """Return whether the layer takes inputs (..., D) and maps each row of D features independently of all other rows."""
    return not isinstance(base, nn.Embedding | Convolution) and kind_of(base) != "experts"


def safe_factor(y: Tensor) -> float:
    """Return a power of two by which y is multiplied without rounding: -2, or -1 if -2 would overflow."""
    return -2.0 if not y.numel() or float(y.abs().amax()) < torch.finfo(y.dtype).max / 4 else -1.0


def columns_of_wider(tensor: Tensor) -> Tensor:
    """Return an equal tensor that has a gap after each row in memory, as a part of a fused weight has. A vector has none.

    The gaps hold large numbers and not NaN: in bfloat16, oneDNN multiplies the number after a row by zero.
    """
    if tensor.dim() < 2:
        return tensor
    limits = torch.finfo(tensor.dtype) if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
    gap = tensor.new_full((*tensor.shape[:-1], 1), limits.max)
    return torch.cat([tensor, gap], dim=-1)[..., :-1]
