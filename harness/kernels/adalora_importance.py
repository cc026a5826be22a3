"""AdaLoRA's importance: averages of sensitivity and uncertainty of many weights in a few passes over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.kernels.device import by_triton


@torch.no_grad()
def observe(
    weights: Sequence[Tensor], grads: Sequence[Tensor], I: Sequence[Tensor], U: Sequence[Tensor], beta1: float,  # noqa: E741
    beta2: float,
) -> None:  # fmt: skip
    """Carry the averages I and U of every weight on by one step, in place (arXiv:2303.10512, eqs. 8 to 10).

    weights, grads: of any floating dtype; I, U: like them, in at least float32, in which all is computed.
    """
    if by_triton(*weights, *grads, *I, *U):
        from harness.kernels.gpu import adalora_importance as gpu

        gpu.observe(weights, grads, I, U, beta1, beta2)
        return
    wide = [w.to(i.dtype) for w, i in zip(weights, I, strict=True)]
    ipt = torch._foreach_mul(wide, [g.to(i.dtype) for g, i in zip(grads, I, strict=True)])
    torch._foreach_abs_(ipt)
    torch._foreach_lerp_(I, ipt, 1 - beta1)
    torch._foreach_sub_(ipt, I)
    torch._foreach_abs_(ipt)
    torch._foreach_lerp_(U, ipt, 1 - beta2)


def scores(I_A: Tensor, U_A: Tensor, I_E: Tensor, U_E: Tensor, I_B: Tensor, U_B: Tensor) -> Tensor:
    """Return how important each triplet is, shape (R,): s of lambda and the means of s over its vectors (eqs. 7 and 11)."""
    return (I_E * U_E)[:, 0] + (I_B * U_B).mean(dim=0) + (I_A * U_A).mean(dim=1)


def adalora_importance(
    A: Tensor, E: Tensor, B: Tensor, grad_A: Tensor, grad_E: Tensor, grad_B: Tensor,
    I_A: Tensor, U_A: Tensor, I_E: Tensor, U_E: Tensor, I_B: Tensor, U_B: Tensor, beta1: float, beta2: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return I_A, U_A, I_E, U_E, I_B, U_B after one step, and the scores (R,) by them; what is given stays as it is.

    A (R, D), E (R, 1), B (out, R), and of each the gradient and the averages of before.
    """
    I, U = [t.clone() for t in (I_A, I_E, I_B)], [t.clone() for t in (U_A, U_E, U_B)]  # noqa: E741
    observe((A, E, B), (grad_A, grad_E, grad_B), I, U, beta1, beta2)
    averages = [t for pair in zip(I, U, strict=True) for t in pair]
    return (*averages, scores(*averages))
