"""VeRA linear layer, y = x W^T + bias + b ((d u) B^T) with u = (x mask) A^T.

In torch, layers with one `SharedProjection` and the same x and A compute u only once, if there is no mask and autograd
keeps u for the backward pass of the first layer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from harness.kernels.device import frozen, multiplied_by_triton
from harness.kernels.torch.support.autocast import cast_by_autocast, outside_autocast


class _Projection(torch.autograd.Function):
    """Autograd function for u = (x mask) A^T, with A frozen.

    Several layers share the autograd node of u, which must survive the backward pass of each layer. A backward pass
    frees saved tensors, so A and the mask are attributes of the node instead. This takes no memory, because A and the
    mask stay alive anyway. Only under autocast does each node keep a copy of A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
        ctx.A, ctx.mask = A, mask
        return (x if mask is None else x * mask) @ A.T

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        dx = du @ ctx.A if ctx.needs_input_grad[0] else None
        return dx if dx is None or ctx.mask is None else dx * ctx.mask, None, None


class _Scaled(torch.autograd.Function):
    """Autograd function for x W^T + bias + b P, where P is (d u) B^T.

    It saves u (T, R), and P (T, E) for the gradient of b. It saves x only if W trains.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, b: Tensor, d: Tensor
    ) -> Tensor:
        P = (u * d) @ B.T
        y = x @ W.T if bias is None else torch.addmm(bias, x, W.T)
        ctx.save_for_backward(u, P, W, B, b, d, x if W.requires_grad else None)
        return y.addcmul_(P, b)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, P, W, B, b, d, x = ctx.saved_tensors
        need_x, need_u, need_W, need_bias, _, need_b, need_d = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative P needs its graph
            P = (u * d) @ B.T
        scaled = dy * b if need_u or need_d else None
        dh = None if scaled is None else scaled @ B
        # Reuse memory: fresh memory of this size costs as much as the product.
        reused = None if torch.is_grad_enabled() else scaled
        db = torch.mul(dy, P, out=reused).sum(0) if need_b else None
        return (
            dy @ W if need_x else None,
            dh * d if need_u and dh is not None else None,
            dy.T @ x if need_W else None,
            dy.sum(0) if need_bias else None,
            None,
            db,
            (dh * u).sum(0) if need_d and dh is not None else None,
        )


class SharedProjection:
    """Cache of the last u = x A^T. The next layers with the same x and A, such as q, k and v, reuse u.

    The cache serves only calls without a mask, because every layer draws its own mask. The cache keeps neither x nor u
    alive: u lives in the autograd graph of a layer's output. Layers without gradients therefore share nothing.
    """

    def __init__(self) -> None:
        # One tuple, so that threads see a consistent state. It keeps A alive: a later A, such as the next copy that
        # autocast makes, could otherwise have the same address.
        self._last: tuple[Any, tuple[Any, ...], Any, Tensor] | None = None

    def __reduce__(self) -> Any:
        """Return what pickle and copy need to make an empty cache."""
        return SharedProjection, ()

    def __call__(self, x: Tensor, A: Tensor) -> Tensor:
        """Return x A^T, shape (T, R), for x (..., D) and A (R, D). A cached result is returned if there is one."""
        if x.is_inference() or A.is_inference():  # inference tensors have no version counter
            return _projection(x, A, None)
        key = A.data_ptr(), A.shape, A._version, x.data_ptr(), x._version, x.requires_grad
        last = self._last
        u: Tensor | None = last[2]() if last is not None and last[0]() is x and last[1] == key else None
        if u is None:
            u = _projection(x, A, None)
            self._last = weakref.ref(x), key, weakref.ref(u), A
        return u


def _projection(x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    rows = None if mask is None else mask.reshape(-1, x.shape[-1])
    u: Tensor = _Projection.apply(x.reshape(-1, x.shape[-1]), A, rows)
    return u


@cast_by_autocast
def vera_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, b: Tensor, d: Tensor, mask: Tensor | None = None,
    shared: SharedProjection | None = None,
) -> Tensor:  # fmt: skip
    """Return x W^T + bias + b ((d ((x mask) A^T)) B^T), shape (..., E) (arXiv:2310.11454, eq. 2).

    Shapes: x (..., D), W (E, D), bias (E,), A (R, D), B (E, R), b (E,), d (R,). mask has the shape of x, or is None.
    All tensors have one dtype, or get it from autocast. The result is differentiable in x, W, bias, b and d: twice in
    torch, once in Triton. If W or the bias trains, torch computes on every device. shared: None, or the cache for x A^T,
    which only calls in torch without a mask use.
    """
    if multiplied_by_triton(x, W, A, B, b, d) and frozen(W, bias):
        from harness.kernels.triton import vera_linear as gpu

        return gpu.vera_linear(x, W, bias, A, B, b, d, mask)
    u = shared(x, A) if shared is not None and mask is None else _projection(x, A, mask)
    y: Tensor = _Scaled.apply(x.reshape(-1, x.shape[-1]), u, W, bias, B, b, d)
    return y.view(*x.shape[:-1], len(W))
