"""riemannian_lora_step: one step of Riemannian preconditioned LoRA, for two adapted layers and another trainable tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Beta, Eps, Factor, FirstStep, LearningRate, Matrix, WeightDecay
from harness.conformance.operation import Arguments, Operation, draw
from harness.conformance.operations.lorafa_step import (
    Experts,
    Kind,
    Other,
    Ranks,
    Unused,
    low_rank_factor,
    moments,
)
from reference.lora_experts import packed
from reference.operations.riemannian import optimizer_step, riemannian_step

Delta = Annotated[float, Factor((1e-2, 1e-6, 1.0), (1e-4,), least=1e-6, most=1.0)]
Optimizer = Annotated[str, Factor(("adamw", "gd"))]
Start = Annotated[str, Factor(("trained", "zero", "one-direction", "nearly-one-direction"))]
Rows = Annotated[str, Factor(("independent",), ("nearly-one-direction",))]
_ASIDE = 0.05
"""Share of a column of B, or of a row of A, that is not common to all of them, if they have nearly one direction."""
_EPS_OF_FLOAT16 = 0.1
"""Smallest eps in float16. Small second moments round to zero in float16, and a division by a smaller eps would then make
the step much too large."""
_TENSORS = ("As", "Bs", "gAs", "gBs", "mAs", "vAs", "mBs", "vBs")


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    ranks: Ranks,
    optimizer: Optimizer = "adamw",
    delta: Delta = 1e-2,
    step: FirstStep = 7,
    lr: LearningRate = 0.1,
    weight_decay: WeightDecay = 0.0,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
    eps: Eps = 1e-8,
    B: Start = "trained",
    gradient: Kind = "dense",
    unused: Unused = "neither",
    other: Other = "bias",
    experts: Experts = 1,
    A: Rows = "independent",
) -> Arguments:
    """Draw the tensors of one call. For step 1, all moments are zero.

    shape: (E, D); the first layer has D inputs and E outputs, the second E inputs and D outputs. ranks: the rank of
    each layer, at most min(E, D). optimizer: `adamw`, or gradient descent (`gd`), which has no moments. delta: added to
    the diagonals of B^T B and A A^T before they are inverted. B: `zero` makes B zero, as at the start of LoRA; with
    `one-direction`, all columns of B are equal, so that B^T B is singular; after a short training they are nearly
    equal, as with `nearly-one-direction`. A: with `nearly-one-direction`, the rows of A are nearly equal, so that A A^T
    is nearly singular. gradient: `zero` makes all gradients zero.
    unused: the layer that gets no gradients, as if it had not run. other: the other trainable tensor of the
    model: the bias of the first layer, the bias of its B (peft's `lora_bias`), or the magnitude of its DoRA. experts:
    number K of matrices in each layer. Above 1, the layers are stacks (peft's `target_parameters`): A (K R, D) has the
    rows of the first expert first, and in B (E, R K), the columns of one component of all experts are side by side. By
    default, lr is so large that the step is as large as the weights. eps: at least 0.1 in float16.
    """
    given: Arguments = {name: [] for name in _TENSORS}
    for (outputs, inputs), rank in zip((shape, shape[::-1]), ranks, strict=True):
        r = min(rank, inputs, outputs)
        A_KRD = torch.stack([low_rank_factor(generator, r, inputs) for _ in range(experts)])
        A_KRD = A_KRD[:, :1] + _ASIDE * A_KRD if A == "nearly-one-direction" else A_KRD
        trained = torch.stack([low_rank_factor(generator, r, outputs).T for _ in range(experts)])
        common = trained[..., :1].expand(-1, -1, r)
        start = {
            "trained": trained, "zero": 0 * trained, "one-direction": common,
            "nearly-one-direction": common + _ASIDE * trained,
        }[B]  # fmt: skip
        G = 2 * draw(generator, torch.float64, experts, outputs, inputs) * (gradient == "dense")
        drawn = [*packed(A_KRD, start), *packed(start.mT @ G, G @ A_KRD.mT)]
        for tensor in drawn[:2]:
            drawn += moments(generator, dtype, tensor.shape, step)
        for name, tensor in zip(_TENSORS, drawn, strict=True):
            given[name].append(tensor.to(dtype))
    if unused != "neither":
        layer = ("first", "second").index(unused)
        given["gAs"][layer] = given["gBs"][layer] = None
    E = shape[0]
    other_m, other_v = moments(generator, dtype, (E,), step)
    return {
        **given,
        "other": draw(generator, dtype, E),
        "other_g": draw(generator, dtype, E) * (gradient == "dense"),
        "other_m": other_m,
        "other_v": other_v,
        "role": other,
        "experts": experts,
        "optimizer": optimizer,
        "delta": delta,
        "step": step,
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": max(eps, _EPS_OF_FLOAT16) if dtype == torch.float16 else eps,
        "weight_decay": weight_decay,
    }


def reference(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    gAs: Sequence[Tensor | None],
    gBs: Sequence[Tensor | None],
    mAs: Sequence[Tensor],
    vAs: Sequence[Tensor],
    mBs: Sequence[Tensor],
    vBs: Sequence[Tensor],
    *,
    other: Tensor,
    other_g: Tensor,
    other_m: Tensor,
    other_v: Tensor,
    role: str,
    experts: int,
    optimizer: Any,
    delta: float,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return the tensors in the order of `OPERATION.outputs`: A, B and their moments for each layer, then `other` and its.

    gAs, gBs: gradients of the As and Bs. options: step, lr, betas, eps and weight_decay. other: another trainable
    tensor of the model; it gets a plain step of the optimizer. role: tells the implementation what kind of tensor
    `other` is. experts: number of matrices in each layer.
    """
    after: list[Tensor] = []
    for A, B, gA, gB, mA, vA, mB, vB in zip(As, Bs, gAs, gBs, mAs, vAs, mBs, vBs, strict=True):
        for one in riemannian_step(
            optimizer, A, B, (gA, gB), (mA, vA), (mB, vB), delta=delta, experts=experts, **options
        ):
            after += one
    after += optimizer_step(optimizer, other, other_g, other_m, other_v, **options)
    return tuple(t.clone() for t in after)


OPERATION = Operation(
    name="riemannian_lora_step",
    outputs=(
        *("A0", "mA0", "vA0", "B0", "mB0", "vB0"),
        *("A1", "mA1", "vA1", "B1", "mB1", "vB1"),
        *("other", "other_m", "other_v"),
    ),
    arguments=arguments,
    reference=reference,
    never_zero=("As", "Bs"),
)
