"""galore_step: one step of GaLore with given projection matrices and given moments."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Beta, Eps, Factor, FirstStep, Matrix, Rank, WeightDecay
from harness.conformance.operation import Arguments, Operation, draw
from harness.conformance.operations.adamw8bit_step import SMALL
from reference import galore

Side = Literal["std", "reverse_std", "paper", "left", "right", "full"]
Scale = Annotated[float, Factor((0.25, 1.0, 4.0), (0.01, 100.0), least=0.01, most=8.0)]
LearningRate = Annotated[float, Factor((4.0,), (0.0, 0.01, 0.1, 1.0), least=0.0, most=8.0)]
Gradient = Literal["dense", "large", "small"]
LARGE = 256.0
"""Factor of a large gradient. The squares of about a third of its numbers exceed the largest float16."""
NEVER = 1_000_000
"""Number of steps until the projection matrices are computed anew. No case has so many steps."""


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    rank: Rank,
    side: Side = "std",
    step: FirstStep = 7,
    weight_decay: WeightDecay = 0.0,
    eps: Eps = 1e-6,
    scale: Scale = 0.25,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
    lr: LearningRate = 4.0,
    gradient: Gradient = "dense",
) -> Arguments:
    """Draw a weight (m, n), its gradient, its moments, and orthonormal projection matrices: P (m, r), Q (n, r) or both.

    The moments have the shape of the projected gradient. side: decides which of P and Q exist. step: number of this
    step; for step 1, the moments are zero. gradient: `large` multiplies the gradient by 256. `small` makes the gradient and
    the moments as small as in a model that is nearly trained. By default, lr is so large that the step is as large as the
    weight.
    """
    m, n = shape
    size = {"dense": 1.0, "large": LARGE, "small": SMALL}[gradient]
    before = min(size, 1.0) * (step > 1)
    left, right = galore.sides(m, n, side)

    def basis(rows: int) -> Tensor:
        orthonormal: Tensor = torch.linalg.qr(draw(generator, torch.float64, rows, min(rank, m, n))).Q
        return orthonormal.to(dtype)

    r = min(rank, m, n)
    low = (r if left else m, r if right else n)
    return {
        "W": draw(generator, dtype, m, n),
        "G": draw(generator, dtype, m, n) * size,
        "P": basis(m) if left else None,
        "Q": basis(n) if right else None,
        "M": draw(generator, dtype, *low) * before,
        "V": draw(generator, dtype, *low).square() * before**2,
        "side": side,
        "step": step,
        "lr": lr,
        "scale": scale,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": weight_decay,
    }


def reference(
    W: Tensor,
    G: Tensor,
    P: Tensor | None,
    Q: Tensor | None,
    M: Tensor,
    V: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, M and V after step number `step`. options: side, lr, scale, eps and weight_decay."""
    bases = {name: t for name, t in (("P", P), ("Q", Q)) if t is not None}
    state: Arguments = {"step": step - 1, "M": M.clone(), "V": V.clone(), **bases}
    W = W.clone()
    rank = min(t.shape[1] for t in bases.values())
    how: Arguments = {"rank": rank, "update_gap": NEVER, "beta1": betas[0], "beta2": betas[1]}
    galore.galore_step(W, G, state, given=galore.Projector(P, Q), **how, **options)
    return W, state["M"], state["V"]


OPERATION = Operation("galore_step", ("W", "M", "V"), arguments, reference, never_zero=("P", "Q"))
