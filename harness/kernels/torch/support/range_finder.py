"""The leading singular vectors of a matrix, without its whole SVD: by its smaller Gram matrix, or by a random range finder.

Halko, Martinsson and Tropp, arXiv:0909.4061: algorithm 4.4 finds an orthonormal basis of the range by power iterations on
a random sketch, 5.1 turns it into an SVD. Shape letters: W (E, D), R singular values are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

SURE = 2.0**-12
"""A ratio of singular values of float32 numbers above which float64 loses by their squares less than float32 holds."""


def orthonormal(Y: Tensor) -> Tensor:
    """Return an orthonormal basis (E, R) of the range of Y (E, R), E >= R.

    Of float32 by the Cholesky factor of Y^T Y in float64, an order of magnitude faster than Householder's reflections on
    a CPU; where the columns are too nearly dependent for that, and for float64, by those.
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
    """Return an orthonormal basis (E, R) that nearly holds the R leading left singular vectors of W (E, D).

    sketch: (D, R), normal. niter: power iterations, each a product with W^T and one with W; the error of a singular
    vector falls by the square of the ratio of the singular values with every one of them.
    """
    Q = orthonormal(W @ sketch)
    for _ in range(niter):
        Q = orthonormal(W @ orthonormal(W.T @ Q))
    return Q


def randomised_svd(W: Tensor, sketch: Tensor, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximate (U (E, R), S (R,), V (D, R)), signs as they come, of W (E, D) in float32 or float64.

    sketch: (min(E, D), R), normal: the longer side's range is found.
    """
    if W.shape[0] < W.shape[1]:
        V, S, U = randomised_svd(W.T, sketch, niter)
        return U, S, V
    Q = range_finder(W, sketch, niter)
    U, S, V = leading_svd(Q.T @ W, sketch.shape[1])
    return Q @ U, S, V


def leading_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U (E, R), S (R,), V (D, R)) of the R largest singular values, signs as they come, by no approximation.

    W: float32 or float64. Of float32 by the eigenvectors of the smaller Gram matrix in float64, in which its products are
    exact. The other side's are W's products with them, divided by S; where S spans more than that bears, or W is float64,
    it is LAPACK's SVD. Raises ValueError if W is not finite.
    """
    if W.shape[0] < W.shape[1]:
        V, S, U = leading_svd(W.T, rank)
        return U, S, V
    _refuse_infinite(W)
    if W.dtype != torch.float64:
        S, V = _by_gram(W.double(), rank)
        if S[-1] > SURE * S[0]:
            return (W.double() @ V).div_(S).to(W.dtype), S.to(W.dtype), V.to(W.dtype)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank].T


def leading_vectors(W: Tensor, rank: int, left: bool, right: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return (U (E, R) if `left` else None, V (D, R) if `right` else None) as `leading_svd`; contiguous.

    Only the shorter side's needs no division, and holds for a singular matrix as well. Raises as it does.
    """
    shorter = right if W.shape[0] >= W.shape[1] else left
    if W.dtype != torch.float64 and shorter and left != right:
        _refuse_infinite(W)
        vectors = _by_gram((W if right else W.T).double(), rank)[1].to(W.dtype)
        return (None, vectors) if right else (vectors, None)
    U, _, V = leading_svd(W, rank)
    return U.contiguous() if left else None, V.contiguous() if right else None


def _refuse_infinite(W: Tensor) -> None:
    """LAPACK calls such a matrix ill-conditioned, or returns NaN without a word."""
    if not W.isfinite().all():
        raise ValueError(
            "a matrix with a NaN or an infinity has no singular vectors; mend the weight or the gradient that it is"
        )


def _by_gram(tall: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (S (R,), V (D, R)) of a tall float64 matrix, by W^T W = V S^2 V^T."""
    squares, V = torch.linalg.eigh(tall.T @ tall)
    return squares.flip(0)[:rank].clamp(min=0).sqrt(), V.flip(1)[:, :rank].contiguous()
