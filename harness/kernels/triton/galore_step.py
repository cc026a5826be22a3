"""One step of GaLore in a given subspace (arXiv:2403.03507, algorithm 2).

The step projects the gradient, takes Adam's step on the projected gradient, and projects the update back. cuBLAS
projects the gradient: no published kernel is faster. Adam is one elementwise pass over the projected gradient.
Projecting back is one matrix product, whose kernel also subtracts the update from W, decays W and rounds once. The
update is therefore never stored in full size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.kernels.compile.specimen import Specimen
from harness.kernels.device import interpreted
from harness.kernels.triton.support.launch import launch
from harness.kernels.triton.support.matrix_product import product
from harness.kernels.triton.support.rounding import load_as_float32, store_as

_CHUNK = 1 << 14 if interpreted() else 1024
_ROWS, _COLUMNS, _INNER = 64, 128, 32


@triton.jit
def _adam(R, M, V, N, M_out, V_out, n, beta1, rest1, beta2, rest2, correction, eps, chunk: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * chunk + tl.arange(0, chunk)
    mask = at < n
    gradient = load_as_float32(R + at, mask=mask, other=0.0)
    first = beta1 * load_as_float32(M + at, mask=mask, other=0.0) + rest1 * gradient
    second = beta2 * load_as_float32(V + at, mask=mask, other=0.0) + rest2 * gradient * gradient
    store_as(M_out + at, first, mask=mask)
    store_as(V_out + at, second, mask=mask)
    store_as(N + at, correction * tl.div_rn(first, tl.sqrt_rn(second) + eps), mask=mask)


@triton.jit
def _back(
    W, X, Y, W_out, m, n, r, stride_xm, stride_xr, stride_yr, stride_yn, step_size, decay,
    rows: tl.constexpr, columns: tl.constexpr, inner: tl.constexpr,
):  # fmt: skip
    """Compute one tile of W_out = decay (W - step_size X Y).

    W and W_out are (m, n) and contiguous. X is (m, r), and Y is (r, n).
    """
    tiles = tl.cdiv(n, columns)
    row = (tl.program_id(0) // tiles) * rows + tl.arange(0, rows)
    column = (tl.program_id(0) % tiles) * columns + tl.arange(0, columns)
    total = tl.zeros([rows, columns], tl.float32)
    left = X + row[:, None].to(tl.int64) * stride_xm
    right = Y + column[None, :].to(tl.int64) * stride_yn
    for first in range(0, r, inner):
        k = first + tl.arange(0, inner)
        x = tl.load(left + k[None, :] * stride_xr, mask=(row < m)[:, None] & (k < r)[None, :], other=0.0)
        y = tl.load(right + k[:, None] * stride_yr, mask=(k < r)[:, None] & (column < n)[None, :], other=0.0)
        total = product(x, y, total)
    at = row[:, None].to(tl.int64) * n + column[None, :]
    mask = (row < m)[:, None] & (column < n)[None, :]
    store_as(W_out + at, decay * (load_as_float32(W + at, mask=mask, other=0.0) - step_size * total), mask=mask)


@torch.no_grad()
def galore_step(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, M: Tensor, V: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, M and V after one step of GaLore.

    The arguments are those of `galore_step_`, in any memory layout. They are not modified.
    """
    W, M, V = (t.contiguous() for t in (W, M, V))
    out = (torch.empty_like(W), torch.empty_like(M), torch.empty_like(V))
    _launch(W, G, P, Q, M, V, out, **options)
    return out


def galore_step_(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, M: Tensor, V: Tensor, **options: Any
) -> None:
    """Take one step of GaLore, and update W, M and V in place.

    W is (m, n), and G is its gradient. P (m, r) and Q (n, r) are the bases of the subspace. One of them may be None,
    which stands for the identity. M and V are the moments, in the shape of the projected gradient P^T G Q. All tensors
    have one dtype: float32, bfloat16 or float16. options: step (from 1), lr, scale (multiplies the update, but not the
    decay), betas, eps (added to sqrt(V) before the bias correction), weight_decay (applied after the update), side
    (ignored, because P and Q imply it). Raises ValueError if W, M or V is not contiguous, if shapes do not fit, or if
    both P and Q are None.
    """
    if not (W.is_contiguous() and M.is_contiguous() and V.is_contiguous()):
        raise ValueError("W, M and V must be contiguous; hint: use `galore_step` for views")
    _launch(W, G, P, Q, M, V, (W, M, V), **options)


def _launch(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, M: Tensor, V: Tensor, out: tuple[Tensor, Tensor, Tensor], *,
    step: int, lr: float, scale: float = 0.25, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
    weight_decay: float = 0.0, side: str = "",
) -> None:  # fmt: skip
    if P is None and Q is None:
        raise ValueError("GaLore needs a basis: P, Q or both")
    if W.shape != G.shape:
        raise ValueError(f"W {tuple(W.shape)} and its gradient {tuple(G.shape)} must have the same shape")
    R = G if P is None else P.T @ G
    R = (R if Q is None else R @ Q).contiguous()
    if not R.shape == M.shape == V.shape:
        raise ValueError(
            f"M {tuple(M.shape)} and V {tuple(V.shape)} must have the shape of the projected gradient, {tuple(R.shape)}"
        )
    N, (beta1, beta2) = torch.empty_like(R), betas
    correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    launch(
        _adam, (triton.cdiv(R.numel(), _CHUNK),),
        R, M, V, N, out[1], out[2], R.numel(), beta1, 1 - beta1, beta2, 1 - beta2, correction, eps,
        chunk=_CHUNK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    X = N if P is None else P if Q is None else P @ N
    Y = N if Q is None else Q.T
    (m, n), r = W.shape, X.shape[1]
    launch(
        _back, (triton.cdiv(m, _ROWS) * triton.cdiv(n, _COLUMNS),),
        W, X, Y, out[0], m, n, r, *X.stride(), *Y.stride(), lr * scale, 1 - lr * weight_decay,
        rows=_ROWS, columns=_COLUMNS, inner=_INNER, num_warps=8, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip


_SCALARS = ("beta1", "rest1", "beta2", "rest2", "correction", "eps")


def _specimens(dtype: str) -> list[Specimen]:
    small = dict.fromkeys(("R", "M", "V", "N", "M_out", "V_out"), f"*{dtype}")
    large = dict.fromkeys(("W", "X", "Y", "W_out"), f"*{dtype}")
    sizes = dict.fromkeys(("m", "n", "r", "stride_xm", "stride_yr"), "i32")
    unit = {"stride_xr": 1, "stride_yn": 1}
    return [
        Specimen(
            name=f"galore_adam-{dtype}", kernel=_adam, kind="streaming", fused_multiply_add=True,
            signature=small | {"n": "i32"} | dict.fromkeys(_SCALARS, "fp32"), constants={"chunk": 1024},
            divisible=(*small, "n"),
        ),
        Specimen(
            name=f"galore_back-{dtype}", kernel=_back, kind="other" if dtype == "fp32" else "gemm",
            fused_multiply_add=True, num_warps=8,
            signature=large | sizes | dict.fromkeys(("step_size", "decay"), "fp32"),
            constants=unit | {"rows": _ROWS, "columns": _COLUMNS, "inner": _INNER}, divisible=(*large, *sizes),
        ),
    ]  # fmt: skip


SPECIMENS = [one for dtype in ("bf16", "fp32") for one in _specimens(dtype)]
