"""Leading singular vectors by a random sketch. Halko, Martinsson and Tropp, 2011, arXiv:0909.4061.

Algorithm 4.4 computes a basis of the range by subspace iterations on W times the sketch; algorithm 5.1 computes the SVD.
Shape letters: W (E, D), K columns of the sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def randomised_svd(W_ED: Tensor, sketch: Tensor, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximations of (U (E, K), S (K,), Vt (K, D)) for the K largest singular values, with LAPACK's signs.

    sketch: (min(E, D), K). niter: subspace iterations; each multiplies the error of a singular vector by the square of
    (largest singular value outside the sketch / its own singular value).
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
