"""int8: the vector-wise quantisation of LLM.int8(). Dettmers et al., NeurIPS 2022, arXiv:2208.07339. Not a Method.

    X W^T ~ (c_x c_w^T) / 127^2 * (X_int8 W_int8^T) over the columns without outliers
            + X W^T over the columns with outliers                                    (section 3)

Each row of X (T, D) and of W (E, D) is divided by its largest magnitude (absmax: c_x, c_w) and rounded to one of the 255
codes from -127 to 127. With a threshold, a column of X that has a number of at least this magnitude, in any row of the
call, is an outlier column. It is multiplied without being quantised or rounded to float16, by the decoded column of W.
Shape letters: T tokens, D inputs, E outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from reference.spec import Deviation, ReferenceSpec

LARGEST_CODE = 127
"""Largest code. -128 is not used, so that the codes are symmetric."""

SPEC = ReferenceSpec(
    paper="arXiv:2208.07339v2, sections 2.1 and 3; rounding and outliers as in bitsandbytes",
    deviations=(
        Deviation(
            topic="numbers before quantisation",
            paper="float16",
            here="rounded to float16 from any dtype, W and X alike; 65,520 and more become infinite",
            why="bitsandbytes does the same",
        ),
        Deviation(
            topic="scaling",
            paper="127 / absmax, rounding not stated",
            here="X (127 / absmax) in float32, rounded half to even; a row of zeros has absmax 0 and codes 0",
            why="bitsandbytes does the same",
        ),
        Deviation(
            topic="absmax of a row of X",
            paper="of the columns without outliers",
            here="of all numbers of the row that are below the threshold, also those in outlier columns",
            why="bitsandbytes does the same",
        ),
        Deviation(
            topic="threshold",
            paper="6.0",
            here="the caller's; 0 means no outliers",
            why="bitsandbytes defaults to 0, transformers to 6.0",
        ),
    ),
)


def quantize(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax): int8 codes in the shape of X (..., D), and one float32 per row.

    X: any floating dtype, read as float16. A row with a NaN or an infinity has this as its absmax, so that none of its
    elements is decoded to a finite value.
    """
    half = X.detach().to(torch.float16).float()
    absmax = half.abs().amax(dim=-1)
    codes = (half * (LARGEST_CODE / absmax)[..., None]).round().nan_to_num()
    return codes.to(torch.int8), absmax


def near_tie(X: Tensor) -> Tensor:
    """Return a mask in the shape of X: True where an element is so near the middle of two codes that rounding may decide.

    An implementation may multiply by 127 and divide by absmax in any order. The results differ by up to 2 units in the
    last place of float32.
    """
    half = X.detach().to(torch.float16).double()
    scaled = (half * LARGEST_CODE / half.abs().amax(dim=-1, keepdim=True)).nan_to_num()
    gap = ((scaled - scaled.floor()) - 0.5).abs()
    return gap <= 2 * torch.finfo(torch.float32).eps * scaled.abs()


def dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the decoded elements, each its code times the absmax of its row / 127.

    dtype: float64, or a narrower dtype, for which the product is formed in float32 and then cast.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * (absmax.to(wide) / LARGEST_CODE)[..., None]).to(dtype)


def multiply(X: Tensor, codes: Tensor, absmax: Tensor, threshold: float, training: bool) -> Tensor:
    """Return X W^T, shape (..., E), in the dtype of X, where W has the codes (E, D) and the absmax (E,).

    In training, W is decoded to the dtype of X. Otherwise X is quantised too, but the gradient of X is the same: rounding
    has no useful gradient.
    """
    Y: Tensor = linear(X, dequantize(codes, absmax, X.dtype))
    if training:
        return Y
    return product(X, codes, absmax, threshold) + (Y - Y.detach())


def product(X: Tensor, codes: Tensor, absmax: Tensor, threshold: float = 0.0) -> Tensor:
    """Return X W^T, shape (..., E), in the dtype of X, where W has the codes (E, D) and the absmax (E,).

    Both factors are quantised, except in outlier columns. The sum of the products of codes is exact. Its scaling is in
    float32, or in float64 for an X in float64. The part of the outlier columns is in the dtype of X. Both parts are
    rounded to this dtype before they are added; an implementation may add them and the bias first, and round once. A NaN
    in a row of X makes this whole row of the result NaN, with any threshold. No gradient.

    A code of X changes the result visibly. So X is quantised by the operations of `quantize` in their order: another order
    gives other codes in the middle between two.
    """
    X = X.detach()
    outlier = X.to(torch.float16).abs() >= threshold if threshold else torch.zeros_like(X, dtype=torch.bool)
    column = outlier.flatten(0, -2).any(dim=0) if X.dim() > 1 else outlier
    X_codes, X_absmax = quantize(X.masked_fill(outlier, 0))
    total = X_codes.masked_fill(column, 0).double() @ codes.double().T
    wide = torch.promote_types(X.dtype, torch.float32)
    scales = X_absmax.to(wide)[..., None] * absmax.to(wide) / LARGEST_CODE**2
    inner = (total.to(wide) * scales).to(X.dtype)
    return inner + linear(X[..., column], dequantize(codes, absmax, X.dtype)[:, column]) if column.any() else inner
