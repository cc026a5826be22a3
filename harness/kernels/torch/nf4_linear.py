"""Linear layer that decodes its packed NF4 weight (arXiv:2305.14314) in each forward and each backward pass.

W (E, D) is the weight, with E outputs and D inputs. T is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from harness.kernels.device import by_triton
from harness.kernels.nf4_format import BLOCK2
from harness.kernels.torch import nf4
from harness.kernels.torch.support.autocast import outside_autocast
from harness.kernels.torch.support.packed_weight import PackedWeight


class _Product(torch.autograd.Function):
    """The function x W^T + bias for x (T, D) or, if `transposed`, x W for x (T, E).

    The gradient of x is dy W or, if `transposed`, dy W^T.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight, transposed: bool) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        if not transposed and (y := weight.times_few(x, bias)) is not None:
            return y
        W = weight.in_buffer(x.dtype)
        if transposed:
            return x @ W
        return x @ W.T if bias is None else torch.addmm(bias, x, W.T)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bias = ctx.needs_input_grad[:2]
        dx = _Product.apply(dy, None, ctx.weight, not ctx.transposed) if need_x else None
        return dx, dy.sum(dim=0) if need_bias else None, None, None


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """Return x W^T + bias, shape (T, E), for x (T, D). If `transposed`, return x W, shape (T, D), for x (T, E).

    The result is differentiable in x and bias.
    """
    y: Tensor = _Product.apply(x, bias, weight, transposed)
    return y


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, shape (..., E), for x (..., D). W is the decoded weight, cast to the dtype of x.

    The result is differentiable in x and bias, any number of times. Under autocast and under torch.compile, the weight
    is decoded first, and `torch.nn.functional.linear` multiplies.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return linear(x, weight.decoded(x.dtype), bias)
    if by_triton(x, weight.packed) and nf4.triton_block(weight.block):
        from harness.kernels.triton import nf4_linear as gpu

        return gpu.nf4_linear(x, weight.packed, weight.constants(), weight.block, weight.shape, bias)
    y = product(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    block: int,
    shape: Sequence[int],
    bias: Tensor | None,
    training: bool = True,
) -> Tensor:
    """Return x W^T + bias, shape (..., E), for x (..., D) and a packed W (E, D).

    packed, absmax, block: W as packed by `nf4.quantize`. shape: (E, D). The result is differentiable in x and bias.
    training: ignored; other implementations of this Operation need it. Raises ValueError if the length of `packed` or
    `absmax` does not fit `shape`.
    """
    E, D = shape
    return packed_linear(x, PackedWeight(packed, absmax, block, (E, D)), bias)


class Nf4Linear(nn.Linear):
    """A linear layer with a frozen weight in NF4: `weight` holds the packed bytes.

    The layer casts its input to `compute_dtype`, multiplies, and casts the output back. The buffers absmax, absmax2 and
    offset hold their numbers as bytes. `model.to(torch.bfloat16)` therefore does not round the numbers, and code that
    looks for the layer's dtype does not find float32.
    """

    absmax: Tensor
    """The absmax of each block of weights: the bytes of float32 numbers or, with double quantisation, 8-bit codes."""
    absmax2: Tensor | None
    """The absmax of each block of 8-bit codes: the bytes of float32 numbers. None without double quantisation."""
    offset: Tensor | None
    """The offset of the 8-bit codes: the bytes of one float32 number. None without double quantisation."""

    def __init__(self, dense: nn.Linear, compute_dtype: torch.dtype, block: int = 64, double: bool = False) -> None:
        """Pack the weight of `dense` and copy its bias. Both are frozen.

        block: number of weights with one absmax. double: True to quantise the absmax, too.
        """
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        packed, absmax = nf4.quantize(dense.weight, block)
        constants = nf4.double_quantize(absmax, BLOCK2) if double else (absmax, None, None)
        for name, constant in zip(("absmax", "absmax2", "offset"), constants, strict=True):
            self.register_buffer(name, None if constant is None else constant.reshape(-1).view(torch.uint8))
        self.compute_dtype, self.block = compute_dtype, block
        self.weight = nn.Parameter(packed, requires_grad=False)
        if dense.bias is not None:
            self.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
        self.train(dense.training)

    @property
    def packed_weight(self) -> PackedWeight:
        """The packed weight with its constants (absmax, absmax2, offset), as `packed_linear` takes it."""
        shape = self.out_features, self.in_features
        if self.absmax2 is None or self.offset is None:
            return PackedWeight(self.weight, self.absmax.view(torch.float32), self.block, shape)
        second = self.absmax2.view(torch.float32), self.offset.view(torch.float32)
        return PackedWeight(self.weight, self.absmax, self.block, shape, *second, BLOCK2)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias, shape (..., E), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return packed_linear(x.to(self.compute_dtype), self.packed_weight, bias).to(x.dtype)
