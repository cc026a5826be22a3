"""Leading singular vectors by a random sketch. Halko, Martinsson and Tropp, 2011, arXiv:0909.4061.

Algorithm 4.4 computes a basis of W's range, by subspace iterations that start from W times the sketch. Algorithm 5.1
computes the SVD in this basis. Shape letters: W is (E, D), and the sketch has K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def randomised_svd(W_ED: Tensor, sketch: Tensor, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximations of U (E, K), S (K,) and Vt (K, D) for the K largest singular values. LAPACK chooses the signs.

    sketch: random start, (min(E, D), K). niter: number of subspace iterations. Each iteration reduces the error of a
    singular vector by the factor (s' / s)^2, where s is its singular value and s' is the (K + 1)-th singular value of
    W.
    """
    if W_ED.shape[0] < W_ED.shape[1]:
        U, S, Vt = randomised_svd(W_ED.T, sketch, niter)
        return Vt.T, S, U.T
    Q = torch.linalg.qr(W_ED @ sketch).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W_ED.T @ Q).Q
        Q = torch.linalg.qr(W_ED @ Q).Q
    U, S, Vt = torch.linalg.svd(Q.T @ W_ED, full_matrices=False)
    return Q @ U, S, Vt
