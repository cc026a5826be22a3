"""One step of GaLore (Zhao et al., arXiv:2403.03507): AdamW in a subspace, without temporaries of W's size.

    R = P^T G Q                                   one product (two products if both sides are projected)
    -N = one step of AdamW from 0 with lr 1       torch's fused kernel: R, M and V are read once
    W = (1 - lr decay) (W - lr scale P N Q^T)     one product that accumulates in W's memory

G is the gradient of W, P and Q span the subspace, and M and V are the moments. 8-bit moments take the step of
`adamw8bit_step_`. Shapes: W and G are (m, n), P is (m, r), and Q is (n, r). R, M and V have the shape of P^T G Q.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from harness.kernels.device import by_triton
from harness.kernels.torch.adamw8bit_step import adamw8bit_step_
from harness.kernels.torch.support.range_finder import leading_vectors, randomised_svd

OVERSAMPLE = 10
"""Number of columns that the sketch of a randomised SVD has in addition to the rank."""


def sides(m: int, n: int, side: str) -> tuple[bool, bool]:
    """Return (left, right): whether an (m, n) matrix is projected on the left, and whether on the right.

    side: `std`, `reverse_std`, `paper`, `left`, `right` or `full` (both sides). Raises ValueError for any other side.
    """
    rules = {
        "std": (m < n, m >= n),
        "reverse_std": (m >= n, m < n),
        "paper": (m <= n, m > n),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }
    if side not in rules:
        raise ValueError(f"unknown side {side!r}; known: {', '.join(rules)}")
    return rules[side]


def refreshed(
    G: Tensor, rank: int, side: str, niter: int = 0, P: Tensor | None = None, Q: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (P, Q): the first `rank` left and the first `rank` right singular vectors of G, in G's dtype.

    side: a word that `sides` takes. P is None if the left side is not projected, and Q if the right side is not. niter:
    0 for an exact SVD; otherwise the number of subspace iterations of a randomised SVD, which starts from the given P
    or Q and from random vectors that are the same in every call. Raises ValueError if G is not finite.
    """
    if not G.isfinite().all():
        raise ValueError(
            f"GaLore: the gradient of a parameter of shape {tuple(G.shape)} contains NaN or infinity and has no singular "
            "vectors; hint: skip the step, or lower the learning rate or the loss scale"
        )
    left, right = sides(G.shape[0], G.shape[1], side)
    W, rank = G.to(torch.promote_types(G.dtype, torch.float32)), min(rank, *G.shape)
    U: Tensor | None
    V: Tensor | None
    if niter:
        U, _, V = randomised_svd(W, _sketch(W, rank, P, Q), niter)
        # `contiguous` would return a view of all vectors at rank 1, and keep them in memory.
        dense = torch.contiguous_format
        U = U[:, :rank].clone(memory_format=dense) if left else None
        V = V[:, :rank].clone(memory_format=dense) if right else None
    else:
        U, V = leading_vectors(W, rank, left, right)
    return None if U is None else U.to(G.dtype), None if V is None else V.to(G.dtype)


def _sketch(W: Tensor, rank: int, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """Return the matrix from which a randomised SVD of W starts: previous singular vectors, padded with random ones.

    The shape is (smaller side of W, at most rank + OVERSAMPLE). P, Q: the previous singular vectors, or None.
    """
    m, n = W.shape
    smaller, larger = (Q, P) if m >= n else (P, Q)
    if smaller is None and larger is not None:
        smaller = (W.T if m >= n else W) @ larger.to(W.dtype)
    old = smaller.to(W.dtype) if smaller is not None else W.new_empty(min(m, n), 0)
    columns = min(rank + OVERSAMPLE, m, n)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(min(m, n), columns, generator=generator, dtype=torch.float64, device="cpu").to(W)
    return torch.cat([old, random[:, old.shape[1] :]], dim=1)


def galore_step(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, M: Tensor, V: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, M and V after one step of GaLore.

    The arguments are those of `galore_step_`, in any memory layout. They are not modified.
    """
    if by_triton(W, G):
        from harness.kernels.triton import galore_step as gpu

        return gpu.galore_step(W, G, P, Q, M, V, **options)
    out = [t.detach().clone(memory_format=torch.contiguous_format) for t in (W, M, V)]
    galore_step_(out[0], G, P, Q, out[1], out[2], **options)
    return out[0], out[1], out[2]


def galore8bit_step(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, M: Tensor, M_absmax: Tensor, V: Tensor, V_absmax: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return W, M, M_absmax, V and V_absmax after one step of GaLore with 8-bit moments.

    The arguments are those of `galore_step_`, in any memory layout. They are not modified.
    """
    W, M, M_absmax, V, V_absmax = (
        t.detach().clone(memory_format=torch.contiguous_format) for t in (W, M, M_absmax, V, V_absmax)
    )
    galore_step_(W, G, P, Q, M, V, M_absmax=M_absmax, V_absmax=V_absmax, **options)
    return W, M, M_absmax, V, V_absmax


@torch.no_grad()
def galore_step_(
    W: Tensor,
    G: Tensor,
    P: Tensor | None,
    Q: Tensor | None,
    M: Tensor,
    V: Tensor,
    *,
    step: int,
    lr: float,
    scale: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    M_absmax: Tensor | None = None,
    V_absmax: Tensor | None = None,
    side: str = "",
) -> None:
    """Take one step of GaLore in the subspace of P, Q or both, and update W, M and V in place.

    step: number of this step, from 1. All tensors have one floating dtype, but M and V may also be float32. M and V are
    contiguous. If M_absmax and V_absmax are given, M and V are 8-bit codes as in `adamw8bit_step_`. side: ignored,
    because P and Q show which sides are projected.

    As in the authors' code, eps is added to sqrt(V), and the bias corrections are part of the step size. Weight decay
    comes last: the updated W is multiplied by 1 - lr weight_decay.
    """
    if M.dtype == W.dtype and W.is_contiguous() and by_triton(W, G):
        from harness.kernels.triton import galore_step as gpu

        gpu.galore_step_(
            W, G, P, Q, M, V, step=step, lr=lr, scale=scale, betas=betas, eps=eps, weight_decay=weight_decay
        )
        return
    R = G if P is None else P.T @ G
    R = R if Q is None else R @ Q
    minus_N = torch.zeros_like(R, memory_format=torch.contiguous_format)
    adam_step_(
        minus_N, R, M, V, step=step, lr=1.0, betas=betas, eps=eps, weight_decay=0.0, M_absmax=M_absmax,
        V_absmax=V_absmax,
    )  # fmt: skip
    decay = 1 - lr * weight_decay
    low, high = (minus_N if P is None else P if Q is None else P @ minus_N), (minus_N if Q is None else Q.T)
    W.addmm_(low, high, beta=decay, alpha=decay * lr * scale)


@torch.no_grad()
def adam_step_(
    p: Tensor, g: Tensor, M: Tensor, V: Tensor, *, step: int, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, M_absmax: Tensor | None = None, V_absmax: Tensor | None = None,
) -> None:  # fmt: skip
    """Update p, M and V in place by the Adam step of `galore_step_`, without a projection.

    p: parameter of any shape. g: its gradient. M, V: contiguous moments, or 8-bit codes if M_absmax and V_absmax are
    given.
    """
    # torch's AdamW, and ours in 8 bits, add eps to sqrt(V / (1 - beta2^t)), and apply weight decay before the update.
    decay, eps = 1 - lr * weight_decay, eps / math.sqrt(1 - betas[1] ** step)
    if weight_decay:
        p.mul_(decay)
    if M_absmax is not None and V_absmax is not None:
        adamw8bit_step_(p, g, M, M_absmax, V, V_absmax, step=step, lr=lr * decay, betas=betas, eps=eps)
        return
    # The fused kernel ignores strides and takes one dtype.
    packed = p.to(M.dtype).contiguous()
    before = torch.full((), float(step - 1), dtype=torch.float32, device=p.device)
    adamw(
        [packed], [g.to(M.dtype).contiguous()], [M], [V], [], [before], fused=True, amsgrad=False, beta1=betas[0],
        beta2=betas[1], lr=lr * decay, weight_decay=0.0, eps=eps, maximize=False,
    )  # fmt: skip
    if packed is not p:
        p.copy_(packed)
