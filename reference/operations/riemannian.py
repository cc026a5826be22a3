"""Riemannian preconditioned LoRA. Zhang and Pilanci, ICML 2024, arXiv:2402.02347. An Operation, not a Method.

LoRA's update is B A, with A (r, D) and B (E, r). The paper defines a metric on the matrices of rank r. In this metric, a
step of steepest descent is

    A' = A - lr (B^T B + delta I)^-1 gA          B' = B - lr gB (A A^T + delta I)^-1

where gA and gB are the gradients of A and B. Both inverses are r x r, and are computed from A and B before the step.
The paper calls this scaled gradient descent. Scaled AdamW gives the preconditioned gradients to AdamW in place of gA
and gB, so that AdamW's moments are moments of the preconditioned gradients. All other trainable tensors of the model
get an ordinary step. Each expert of a layer of stacked experts counts as one layer. The A and B of all experts are
packed as in `reference.lora_experts`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from reference.lora_experts import packed, unpacked
from reference.operations.adamw import adamw_step
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2402.02347, scaled gradient descent and scaled AdamW",
    deviations=(
        Deviation(
            topic="delta",
            paper="a small number",
            here="an argument",
            why="the authors' code has 1e-6 or none, and peft 1e-2 by default",
        ),
        Deviation(
            topic="order of A and B",
            paper="both inverses are of step t",
            here="as the paper",
            why="peft does the same; the authors' optimizers step A first and take the inverse for B from the new A",
        ),
        Deviation(
            topic="AdamW",
            paper="does not state where eps and the weight decay are applied",
            here="as in torch's AdamW: decay first, eps after the bias correction",
            why="peft wraps torch's optimizers; the authors' optimizer for Mistral decays after the update and by default "
            "has no bias correction, and that for GPT-2 decays before the update and has one",
        ),
        Deviation(
            topic="layers that are not linear",
            paper="not stated",
            here="not offered",
            why="peft takes a plain step of the adapters of embeddings",
        ),
    ),
)
Kind = Literal["adamw", "gd"]


def preconditioned(
    gA: Tensor, gB: Tensor, A: Tensor, B: Tensor, delta: float, experts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (B^T B + delta I)^-1 gA, of the shape (r, D), and gB (A A^T + delta I)^-1, of the shape (E, r).

    The systems of equations are solved in float32, or in float64 if A has this dtype. The results have the dtypes of the
    gradients. experts: number of stacked experts. If there are several, A is (experts * r, D) and B is (E, r * experts),
    both packed, and so are their gradients.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    A_KRD, B_KER = unpacked(A.to(wide), B.to(wide), experts)
    gA_KRD, gB_KER = unpacked(gA.to(wide), gB.to(wide), experts)
    damping = delta * torch.eye(A_KRD.shape[1], dtype=wide, device=A.device)
    of_A, of_B = A_KRD @ A_KRD.mT + damping, B_KER.mT @ B_KER + damping
    new_A, new_B = packed(torch.linalg.solve(of_B, gA_KRD), torch.linalg.solve(of_A, gB_KER, left=False))
    return new_A.to(gA.dtype), new_B.to(gB.dtype)


def optimizer_step(
    kind: Kind, p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr: float, weight_decay: float, **adamw: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parameter p and its moments m and v after a step with the gradient g.

    kind: `adamw` calls `adamw_step`, with the keywords `adamw`. `gd` is gradient descent, p = (1 - lr weight_decay) p -
    lr g, and does not change m and v. In 16 bits, g, m and v are rounded before p is computed; an implementation may
    compute all in float32, and round only the results.
    """
    if kind == "adamw":
        return adamw_step(p, g, m, v, lr=lr, weight_decay=weight_decay, **adamw)
    return (1 - lr * weight_decay) * p - lr * g, m, v


def riemannian_step(
    kind: Kind,
    A: Tensor,
    B: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    moments_A: tuple[Tensor, Tensor],
    moments_B: tuple[Tensor, Tensor],
    *,
    delta: float,
    experts: int = 1,
    **options: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return A and its moments m and v after a step, then B and its moments.

    gradients: gradient of A, then of B. Both are None if the layer did not run; such a layer does not change. experts:
    number of stacked experts, else 1. options: keywords of `optimizer_step`. Raises ValueError if only one of A and B
    has a gradient.
    """
    gA, gB = gradients
    if gA is None and gB is None:
        return (A, *moments_A), (B, *moments_B)
    if gA is None or gB is None:
        raise ValueError(f"{'A' if gA is None else 'B'} has no gradient, but its partner has one; train both or none")
    gA, gB = preconditioned(gA, gB, A, B, delta, experts)
    return optimizer_step(kind, A, gA, *moments_A, **options), optimizer_step(kind, B, gB, *moments_B, **options)
