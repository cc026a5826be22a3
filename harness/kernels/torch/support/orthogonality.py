"""AdaLoRA's orthogonality term, with one batched product for all matrices of the same shape."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonality(P: Iterable[Tensor], Q: Iterable[Tensor], form: str) -> Tensor:
    """Return AdaLoRA's orthogonality term R(P, Q), a differentiable scalar (arXiv:2303.10512, eq. 4).

    P: matrices (out, R) whose columns should be orthonormal. Q: matrices (R, in) whose rows should be orthonormal.
    form: `squared-sum` adds the squared Frobenius norms of all P^T P - I and Q Q^T - I. `mean-norm` takes the mean of
    these norms, not squared.
    """
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
    for wide in (*(p.T for p in P), *Q):
        alike.setdefault((wide.shape, wide.dtype, wide.device), []).append(wide)
    squares = []
    for same in alike.values():
        rows = torch.stack(same)
        gaps = rows @ rows.mT - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        squares.append(gaps.square().sum((1, 2)) if form == "squared-sum" else torch.linalg.matrix_norm(gaps))
    each = torch.cat(squares)
    return each.sum() if form == "squared-sum" else each.mean()
