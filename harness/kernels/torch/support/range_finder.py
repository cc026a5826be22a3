"""Leading singular vectors of a matrix without a full SVD: from a smaller Gram matrix, or by a random range finder.

The algorithms are those of Halko, Martinsson and Tropp, arXiv:0909.4061. Algorithm 4.4 finds an orthonormal basis of
the range by power iterations on a random sketch. Algorithm 5.1 turns this basis into an SVD. Shapes: W is (E, D), and R
is the number of requested singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_GRAM_RATIO = 2.0**-12
"""Limit of the ratio smallest requested / largest singular value of a float32 matrix.

Above this ratio, the SVD is computed from the Gram matrix in float64: squaring singular values then loses less than the
precision of float32. Below it, LAPACK computes the SVD.
"""


def orthonormal(Y: Tensor) -> Tensor:
    """Return an orthonormal basis (E, R) of the range of Y (E, R). E must be at least R.

    For float32, the basis comes from the Cholesky factor of Y^T Y in float64. On a CPU this is an order of magnitude
    faster than Householder reflections, which are used for float64 and for nearly dependent columns.
    """
    if Y.dtype != torch.float64:
        wide = Y.double()
        factor, failed = torch.linalg.cholesky_ex(wide.T @ wide, upper=True)
        diagonal = factor.diagonal()
        if not failed and diagonal.min() > LEAST_GRAM_RATIO * diagonal.max():
            solved: Tensor = torch.linalg.solve_triangular(factor, wide, upper=True, left=False)
            return solved.to(Y.dtype)
    Q: Tensor = torch.linalg.qr(Y).Q
    return Q


def range_finder(W: Tensor, sketch: Tensor, niter: int) -> Tensor:
    """Return an orthonormal basis (E, R) that approximately contains the R leading left singular vectors of W (E, D).

    sketch: normal noise (D, R). niter: number of power iterations. Each iteration multiplies by W^T and then by W. In
    each, the error of a vector with singular value s falls by the factor (s' / s)^2, where s' is the largest singular
    value outside the basis.
    """
    Q = orthonormal(W @ sketch)
    for _ in range(niter):
        Q = orthonormal(W @ orthonormal(W.T @ Q))
    return Q


def randomised_svd(W: Tensor, sketch: Tensor, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximate U (E, R), S (R,) and V (D, R) of the SVD of W (E, D). Signs are arbitrary.

    W: float32 or float64. sketch: normal noise (min(E, D), R).
    """
    if W.shape[0] < W.shape[1]:
        V, S, U = randomised_svd(W.T, sketch, niter)
        return U, S, V
    Q = range_finder(W, sketch, niter)
    U, S, V = leading_svd(Q.T @ W, sketch.shape[1])
    return Q @ U, S, V


def leading_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (E, R), S (R,) and V (D, R) for the R largest singular values of W (E, D), exactly. Signs are arbitrary.

    W: float32 or float64. For float32, the singular vectors on the shorter side are eigenvectors of the smaller Gram
    matrix. This matrix is in float64, which holds products of float32 numbers exactly. The vectors on the other side
    are W's products with these eigenvectors, divided by S. LAPACK computes the SVD if W is float64, or if the range of
    S is too large. Raises ValueError if W is not finite.
    """
    if W.shape[0] < W.shape[1]:
        V, S, U = leading_svd(W.T, rank)
        return U, S, V
    _check_finite(W)
    if W.dtype != torch.float64:
        S, V = _by_gram(W.double(), rank)
        if S[-1] > LEAST_GRAM_RATIO * S[0]:
            return (W.double() @ V).div_(S).to(W.dtype), S.to(W.dtype), V.to(W.dtype)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank].T


def leading_vectors(W: Tensor, rank: int, left: bool, right: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return U (E, R) and V (D, R) of `leading_svd`, contiguous.

    U is None if `left` is false, and V is None if `right` is false. The vectors on the shorter side of W (V if E >= D,
    otherwise U) are computed without a division by S, so they are correct even if W is singular. Raises ValueError as
    `leading_svd` does.
    """
    shorter = right if W.shape[0] >= W.shape[1] else left
    if W.dtype != torch.float64 and shorter and left != right:
        _check_finite(W)
        vectors = _by_gram((W if right else W.T).double(), rank)[1].to(W.dtype)
        return (None, vectors) if right else (vectors, None)
    U, _, V = leading_svd(W, rank)
    # `contiguous` would return a view of all vectors at rank 1, and keep them in memory.
    dense = torch.contiguous_format
    return U.clone(memory_format=dense) if left else None, V.clone(memory_format=dense) if right else None


def _check_finite(W: Tensor) -> None:
    """Raise ValueError unless W is finite. LAPACK would report W as ill-conditioned, or silently return NaN."""
    if not W.isfinite().all():
        raise ValueError(
            "a matrix with NaN or infinity has no singular vectors; hint: check the weight or the gradient it comes from"
        )


def _by_gram(tall: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return S (R,) and V (D, R) of a tall float64 matrix W, from the eigenvectors of W^T W = V S^2 V^T."""
    squares, V = torch.linalg.eigh(tall.T @ tall)
    return squares.flip(0)[:rank].clamp(min=0).sqrt(), V.flip(1)[:, :rank].contiguous()
