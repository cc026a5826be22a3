"""LoRA-FA: LoRA with a frozen A. Zhang et al., arXiv:2308.03303. An Operation, not a Method.

A layer computes W0 x + s B A x, with A (r, D), B (E, r) and the scaling s. A never changes, so that only B has a
gradient. If G (E, D) is the gradient of the whole weight, the chain rule gives B the gradient g = s G A^T. If d is
subtracted from B, the weight changes by -s d A. Version 2 of the paper takes the d for which this change is nearest to
-G:

    d = argmin || s d A - G ||_F^2 = (1 / s) G A^T (A A^T)^-1 = (1 / s^2) g (A A^T)^-1

AdamW gets d, the corrected gradient, in place of g, so that its moments are moments of d. In version 1 of the paper,
AdamW gets g. All other trainable tensors of the model get an ordinary step of AdamW. Each expert of a layer of stacked
experts counts as one layer. The A and B of all experts are packed as in `reference.lora_experts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from reference.lora_experts import packed, unpacked
from reference.operations.adamw import adamw_step
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2308.03303v2, the closed-form correction of the gradient",
    deviations=(
        Deviation(
            topic="gradient",
            paper="version 1 gives the gradient of B to the optimizer as it is; version 2 corrects it",
            here="the setting `correction`: `least-squares` (version 2) or `none` (version 1)",
            why="peft corrects the gradient",
        ),
        Deviation(
            topic="inverse",
            paper="(A A^T)^-1",
            here="the pseudo-inverse of A A^T + 1e-8 I",
            why="as peft; if rows of A depend on each other, as with a rank above the number of inputs, there is no inverse",
        ),
        Deviation(
            topic="AdamW",
            paper="does not state where eps and the weight decay are applied",
            here="the keyword `form` of `adamw_step`: `transformers` or `torch`",
            why="peft's optimizer follows the AdamW that transformers had; torch's differs in both",
        ),
        Deviation(
            topic="a layer without a gradient",
            paper="not stated",
            here="does not change, and its moments do not either",
            why="every optimizer of torch does the same",
        ),
    ),
)
DELTA = 1e-8
"""Number that is added to the diagonal of A A^T, so that it can be inverted."""
Correction = Literal["least-squares", "none"]


def corrected(g: Tensor, A: Tensor, scaling: float, experts: int = 1) -> Tensor:
    """Return g (A A^T + DELTA I)^+ / scaling^2, of the shape (E, r) and the dtype of g. DELTA is 1e-8.

    ^+ is the pseudo-inverse of torch.linalg.pinv: singular values below r eps times the largest count as 0. It is computed
    in float32, or in float64 if A has this dtype, and eps is that of this dtype. scaling must not be 0. If A A^T is not
    finite, the result is NaN. In 16 bits, an implementation may keep the result in float32.

    experts: number of stacked experts. If there are several, A is (experts * r, D) and g is (E, r * experts), both
    packed.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    A_KRD, g_KER = unpacked(A.to(wide), g.to(wide), experts)
    square_KRR = A_KRD @ A_KRD.mT + DELTA * torch.eye(A_KRD.shape[1], dtype=wide, device=A.device)
    finite_K11 = square_KRR.isfinite().all(dim=(1, 2), keepdim=True)
    square_KRR, g_KER = square_KRR.where(finite_K11, 0.0), g_KER.where(finite_K11, torch.nan)  # pinv raises for NaN
    new_KER = g_KER @ torch.linalg.pinv(square_KRR) / scaling**2
    return packed(A_KRD, new_KER)[1].to(g.dtype)


def lorafa_step(
    A: Tensor,
    B: Tensor,
    g: Tensor | None,
    m: Tensor,
    v: Tensor,
    scaling: float,
    *,
    correction: Correction,
    experts: int = 1,
    **adamw: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return B, m and v of one layer after a step.

    g: gradient of B, or None if B has none. m, v: moments of B. correction: `least-squares` corrects g, `none`
    leaves g unchanged. experts: number of stacked experts, else 1. adamw: the keywords of `adamw_step`.
    """
    if g is None:
        return B, m, v
    if correction == "least-squares":
        g = corrected(g, A, scaling, experts)
    return adamw_step(B, g, m, v, **adamw)


def lorafa_steps(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    gs: Sequence[Tensor | None],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    scalings: Sequence[float],
    **options: Any,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return B, m and v of every layer after a step. Each layer has its own rank and scaling.

    options: keywords of `lorafa_step`.
    """
    layers = zip(As, Bs, gs, ms, vs, scalings, strict=True)
    return [lorafa_step(A, B, g, m, v, scaling, **options) for A, B, g, m, v, scaling in layers]
