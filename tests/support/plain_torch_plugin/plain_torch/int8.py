"""Vector-wise 8-bit products with outlier columns (LLM.int8(), arXiv:2208.07339)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def codes_of(X: Tensor, absmax: Tensor) -> Tensor:
    """Return X times 127 / absmax of its row, rounded half to even, in float32."""
    return torch.round(X * (127 / torch.where(absmax == 0, 1, absmax))[..., None])


@torch.no_grad()
def int8_quantize(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and the absmax of every row of W, read as float16."""
    W = W.half().float()
    absmax = W.abs().amax(dim=-1)
    return codes_of(W, absmax).nan_to_num(0.0).to(torch.int8), absmax


def int8_dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return code times absmax / 127, formed in float32, or in float64 for this dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * absmax.to(wide)[:, None] / 127).to(dtype)


@torch.no_grad()
def int8_product(x: Tensor, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
    """Return x W^T, where x is quantised too, except in columns with a number of at least the threshold."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, codes.shape[1])
    X = rows.half().float()
    outlying = X.abs() >= threshold if threshold else torch.zeros_like(X, dtype=torch.bool)
    columns = outlying.any(dim=0)
    row_absmax = X.masked_fill(outlying, 0).abs().amax(dim=1)
    x_codes = codes_of(X.masked_fill(columns, 0), row_absmax)
    exact = x_codes.double() @ codes.double().T
    y = exact.to(wide) * row_absmax.to(wide)[:, None] * absmax.to(wide) / (127 * 127)
    if columns.any():
        decoded = int8_dequantize(codes, absmax, x.dtype)
        y = y + functional.linear(rows[:, columns], decoded[:, columns]).to(wide)
    return y.to(x.dtype).reshape(*x.shape[:-1], len(codes))


class Int8Product(torch.autograd.Function):
    """Quantised product, whose gradient is that of the product with the decoded weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
        return int8_product(x, codes, absmax, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, codes, absmax, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(codes, absmax)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ int8_dequantize(*ctx.saved_tensors, ctx.dtype), None, None, None


def int8_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, training: bool
) -> Tensor:
    """Return x W^T + bias. In training, x is not quantised."""
    if training:
        return functional.linear(x, int8_dequantize(codes, absmax, x.dtype), bias)
    y = Int8Product.apply(x, codes, absmax, threshold)
    return y if bias is None else y + bias.to(y.dtype)
