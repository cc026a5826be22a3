"""Leading singular vectors of a matrix without a full SVD: by its smaller Gram matrix, or by a random range finder.

Halko, Martinsson and Tropp, arXiv:0909.4061: algorithm 4.4 finds an orthonormal basis of the range by power iterations on
a random sketch, 5.1 turns it into an SVD. Shapes: W (E, D), R requested singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

SURE = 2.0**-12
"""Ratio of singular values above which squaring them in float64 loses less than the precision of float32."""


def orthonormal(Y: Tensor) -> Tensor:
    """Return an orthonormal basis (E, R) of the range of Y (E, R), E >= R.

    float32 uses the Cholesky factor of Y^T Y in float64, which on a CPU is an order of magnitude faster than Householder
    reflections. Nearly dependent columns and float64 use Householder reflections.
    """
    if Y.dtype != torch.float64:
        wide = Y.double()
        factor, failed = torch.linalg.cholesky_ex(wide.T @ wide, upper=True)
        diagonal = factor.diagonal()
        if not failed and diagonal.min() > SURE * diagonal.max():
            solved: Tensor = torch.linalg.solve_triangular(factor, wide, upper=True, left=False)
            return solved.to(Y.dtype)
    Q: Tensor = torch.linalg.qr(Y).Q
    return Q


def range_finder(W: Tensor, sketch: Tensor, niter: int) -> Tensor:
    """Return an orthonormal basis (E, R) that approximately contains the R leading left singular vectors of W (E, D).

    sketch: (D, R), normal. niter: power iterations, each a product with W^T and one with W; each reduces the error of a
    singular vector by the square of the ratio of the singular values.
    """
    Q = orthonormal(W @ sketch)
    for _ in range(niter):
        Q = orthonormal(W @ orthonormal(W.T @ Q))
    return Q


def randomised_svd(W: Tensor, sketch: Tensor, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximate (U (E, R), S (R,), V (D, R)), with arbitrary signs, of W (E, D) in float32 or float64.

    sketch: (min(E, D), R), normal.
    """
    if W.shape[0] < W.shape[1]:
        V, S, U = randomised_svd(W.T, sketch, niter)
        return U, S, V
    Q = range_finder(W, sketch, niter)
    U, S, V = leading_svd(Q.T @ W, sketch.shape[1])
    return Q @ U, S, V


def leading_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U (E, R), S (R,), V (D, R)) of the R largest singular values, exact, with arbitrary signs.

    W: float32 or float64. For float32, the vectors of the shorter side are eigenvectors of the smaller Gram matrix in
    float64, which holds products of float32 exactly; the vectors of the other side are W's products with them, divided by
    S. If W is float64, or the range of S is too large, LAPACK computes the SVD. Raises ValueError if W is not finite.
    """
    if W.shape[0] < W.shape[1]:
        V, S, U = leading_svd(W.T, rank)
        return U, S, V
    _check_finite(W)
    if W.dtype != torch.float64:
        S, V = _by_gram(W.double(), rank)
        if S[-1] > SURE * S[0]:
            return (W.double() @ V).div_(S).to(W.dtype), S.to(W.dtype), V.to(W.dtype)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank].T


def leading_vectors(W: Tensor, rank: int, left: bool, right: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return (U (E, R) if `left` else None, V (D, R) if `right` else None) of `leading_svd`, contiguous.

    The vectors of the shorter side need no division, so that they are also right for a singular matrix. Raises ValueError
    as `leading_svd` does.
    """
    shorter = right if W.shape[0] >= W.shape[1] else left
    if W.dtype != torch.float64 and shorter and left != right:
        _check_finite(W)
        vectors = _by_gram((W if right else W.T).double(), rank)[1].to(W.dtype)
        return (None, vectors) if right else (vectors, None)
    U, _, V = leading_svd(W, rank)
    return U.contiguous() if left else None, V.contiguous() if right else None


def _check_finite(W: Tensor) -> None:
    """Raise ValueError unless W is finite. LAPACK would call W ill-conditioned, or silently return NaN."""
    if not W.isfinite().all():
        raise ValueError(
            "a matrix with NaN or infinity has no singular vectors; hint: check the weight or the gradient it comes from"
        )


def _by_gram(tall: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (S (R,), V (D, R)) of a tall float64 matrix W, by W^T W = V S^2 V^T."""
    squares, V = torch.linalg.eigh(tall.T @ tall)
    return squares.flip(0)[:rank].clamp(min=0).sqrt(), V.flip(1)[:, :rank].contiguous()
