"""AdaLoRA's importance scores (arXiv:2303.10512): moving averages of sensitivity and uncertainty.

The sensitivity of a factor is |factor x gradient|, and its uncertainty is |sensitivity - average sensitivity|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.kernels.device import by_triton

Tensors = Sequence[Tensor]
Gradients = Sequence[Tensor | None]


@torch.no_grad()
def adalora_importance_(
    A: Tensors, E: Tensors, B: Tensors, grad_A: Gradients, grad_E: Gradients, grad_B: Gradients,
    I_A: Tensors, U_A: Tensors, I_E: Tensors, U_E: Tensors, I_B: Tensors, U_B: Tensors, beta1: float, beta2: float,
) -> None:  # fmt: skip
    """Update the moving averages of several layers by one step, in place (arXiv:2303.10512, eqs. 8 to 10).

    Each layer has factors A (R, D), E (R, 1) and B (out, R) of one floating dtype. A gradient of None stands for zeros.
    For each factor, I is the average of the sensitivity and U the average of the uncertainty, both in the factor's
    shape. The arithmetic is in the dtype of I and U, which is at least float32.
    """
    if by_triton(*A, *E, *B, *I_A, *I_E, *I_B):
        from harness.kernels.triton import adalora_importance as gpu

        gpu.adalora_importance_(
            A, E, B, grad_A, grad_E, grad_B, I_A, U_A, I_E, U_E, I_B, U_B, beta1, beta2
        )  # fmt: skip
        return
    I, U = [*I_A, *I_E, *I_B], [*U_A, *U_E, *U_B]  # noqa: E741  # the paper's letters
    weights = [w.detach().to(i.dtype) for w, i in zip([*A, *E, *B], I, strict=True)]
    grads = zip(weights, [*grad_A, *grad_E, *grad_B], strict=True)
    change = torch._foreach_mul(weights, [torch.zeros_like(w) if g is None else g.to(w.dtype) for w, g in grads])
    torch._foreach_abs_(change)
    _average(I, change, beta1)
    torch._foreach_sub_(change, I)
    torch._foreach_abs_(change)
    _average(U, change, beta2)


def _average(averages: list[Tensor], values: tuple[Tensor, ...] | list[Tensor], beta: float) -> None:
    """Replace each average by beta times itself plus (1 - beta) times its value.

    `lerp` with the weight 1 - beta would round a small beta, so that the average of a layer without gradients vanishes.
    """
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, values, alpha=1 - beta)


def adalora_importance(
    A: Tensor, E: Tensor, B: Tensor, grad_A: Tensor, grad_E: Tensor, grad_B: Tensor,
    I_A: Tensor, U_A: Tensor, I_E: Tensor, U_E: Tensor, I_B: Tensor, U_B: Tensor, beta1: float, beta2: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return I_A, U_A, I_E, U_E, I_B, U_B of one layer after one step, and the layer's scores (R,), one per rank.

    The equations are 7 to 11 of arXiv:2303.10512. The arguments are not modified. Their shapes and dtypes are those of
    one layer in `adalora_importance_`.
    """
    if by_triton(A, E, B, I_A, I_E, I_B):
        from harness.kernels.triton import adalora_importance as gpu

        arguments = A, E, B, grad_A, grad_E, grad_B, I_A, U_A, I_E, U_E, I_B, U_B
        return gpu.adalora_importance(*arguments, beta1, beta2)
    before = {"I_A": I_A, "U_A": U_A, "I_E": I_E, "U_E": U_E, "I_B": I_B, "U_B": U_B}
    after = {name: t.clone(memory_format=torch.contiguous_format) for name, t in before.items()}
    lists = {name: [t] for name, t in after.items()}
    adalora_importance_([A], [E], [B], [grad_A], [grad_E], [grad_B], beta1=beta1, beta2=beta2, **lists)
    s_A, s_E, s_B = (after[f"I_{letter}"] * after[f"U_{letter}"] for letter in "AEB")
    return (*after.values(), s_E[:, 0] + s_B.mean(dim=0) + s_A.mean(dim=1))
