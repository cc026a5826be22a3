"""lorafa_step: one step of LoRA-FA for the B of two adapted layers and for another trainable tensor of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from harness.conformance.drawing.factors import Beta, Eps, Factor, FirstStep, LearningRate, Matrix, WeightDecay
from harness.conformance.operation import Arguments, Operation, draw
from reference.lora_experts import packed
from reference.operations.adamw import adamw_step
from reference.operations.lorafa import lorafa_steps

Ranks = Annotated[
    Sequence[int],
    Factor(((3, 8), (1, 1), (16, 4), (2, 65)), ((130, 17), (300, 260)), least=1, most=130, dimensions=(2,)),
]
Scaling = Annotated[float, Factor((2.0, 1.0, 0.25, 16.0), (0.05, 64.0), least=0.05, most=64.0)]
Correction = Annotated[str, Factor(("least-squares", "none"), optional=True)]
Form = Annotated[str, Factor(("transformers", "torch"), optional=True)]
Other = Annotated[str, Factor(("bias", "lora-bias", "magnitude"), optional=True)]
Kind = Annotated[str, Factor(("dense", "zero"))]
Unused = Annotated[str, Factor(("neither", "second", "first"), optional=True)]
Experts = Annotated[int, Factor((1, 3, 8), optional=True)]
Start = Annotated[str, Factor(("trained", "zero"))]
Rows = Annotated[str, Factor(("independent", "dependent", "graded"))]
_GRADED = 100.0
"""Ratio of the largest to the smallest singular value of a graded A. For A A^T it is the square of this number."""


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    ranks: Ranks,
    scaling: Scaling = 2.0,
    step: FirstStep = 7,
    lr: LearningRate = 0.1,
    weight_decay: WeightDecay = 0.0,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
    eps: Eps = 1e-6,
    A: Rows = "independent",
    B: Start = "trained",
    gradient: Kind = "dense",
    unused: Unused = "neither",
    other: Other = "bias",
    experts: Experts = 1,
    correction: Correction = "least-squares",
    adamw: Form = "transformers",
    bias_correction: bool = True,
) -> Arguments:
    """Draw the tensors of one call. For step 1, all moments are zero.

    shape: (E, D); the first layer has D inputs and E outputs, the second E inputs and D outputs. ranks: the rank of
    each layer, at most the number of its inputs. scaling: scaling of the first layer; the second layer has 3 / 4 of it.
    A: `dependent` makes the last row of each A with several rows a copy of its first row, so that A A^T has no inverse.
    `graded` gives each A singular values from 1 to 0.01, so that A A^T is ill-conditioned, but has an inverse.
    B: `zero` makes B zero, as at the start of LoRA. gradient: `zero` makes all gradients zero. unused: the layer
    whose B gets no gradient, as if the layer had not run. other: the other trainable tensor of the model:
    the bias of the first layer, the bias of its B (peft's `lora_bias`), or the magnitude of its DoRA. experts: number
    of matrices in each layer; above 1, the layers are stacks (peft's `target_parameters`), packed as in
    reference/lora_experts.py. correction: how the gradient of B is corrected (LoRA-FA's version 2), or `none` (version
    1). adamw: the library whose form of AdamW takes the step. By default, lr is so large that the step is as large as
    the weights.
    """
    scalings = [scaling, 0.75 * scaling]
    given: Arguments = {name: [] for name in ("As", "Bs", "gs", "ms", "vs")}
    for (outputs, inputs), rank, s in zip((shape, shape[::-1]), ranks, scalings, strict=True):
        A_KRD = torch.stack([low_rank_factor(generator, min(rank, inputs), inputs) for _ in range(experts)])
        G_KED = draw(generator, torch.float64, experts, outputs, inputs) * (gradient == "dense")
        if A == "dependent" and A_KRD.shape[1] > 1:
            A_KRD[:, -1] = A_KRD[:, 0]
        if A == "graded":
            U, S, Vt = torch.linalg.svd(A_KRD, full_matrices=False)
            A_KRD = U * torch.logspace(0, -1, S.shape[1], _GRADED, dtype=torch.float64) @ Vt
        packed_A, g = packed(A_KRD, s * G_KED @ A_KRD.mT)
        m, v = moments(generator, dtype, g.shape, step)
        start = draw(generator, dtype, *g.shape, spread=0.5) * (B == "trained")
        for name, tensor in zip(given, (packed_A.to(dtype), start, g.to(dtype), m, v), strict=True):
            given[name].append(tensor)
    if unused != "neither":
        given["gs"][("first", "second").index(unused)] = None
    E = shape[0]
    other_m, other_v = moments(generator, dtype, (E,), step)
    return {
        **given,
        "scalings": scalings,
        "other": draw(generator, dtype, E),
        "other_g": draw(generator, dtype, E) * (gradient == "dense"),
        "other_m": other_m,
        "other_v": other_v,
        "role": other,
        "experts": experts,
        "step": step,
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": weight_decay,
        "correction": correction,
        "adamw": adamw,
        "bias_correction": bias_correction,
    }


def low_rank_factor(generator: torch.Generator, rank: int, inputs: int) -> Tensor:
    """Return a random A (rank, inputs) in float64, whose singular values are between about 0.2 and 1 for every rank.

    A plain random square matrix would be nearly singular, so that rounding errors would hide every mistake.
    """
    rows: Tensor = torch.linalg.qr(draw(generator, torch.float64, inputs, rank)).Q.T
    mixed = 0.6 * torch.eye(rank, dtype=torch.float64) + draw(
        generator, torch.float64, rank, rank, spread=0.2 / rank**0.5
    )
    return mixed @ rows


def moments(generator: torch.Generator, dtype: torch.dtype, shape: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
    """Return random moments (m, v) of a parameter before step number `step`. Before step 1, they are zero."""
    m, v = draw(generator, dtype, *shape), draw(generator, dtype, *shape).square()
    return (m, v) if step > 1 else (torch.zeros_like(m), torch.zeros_like(v))


@torch.no_grad()
def reference(
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    gs: Sequence[Tensor | None],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    other: Tensor,
    other_g: Tensor,
    other_m: Tensor,
    other_v: Tensor,
    role: str,
    experts: int,
    correction: Any,
    adamw: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return A, B and the moments m and v of B for each layer, then `other` and its moments.

    gs: gradients of the Bs. options: step, lr, betas, eps, weight_decay and bias_correction. experts: number of
    matrices in each layer. other: another trainable tensor of the model; it gets a plain step of AdamW. role: tells the
    implementation what kind of tensor `other` is.
    """
    options["form"] = adamw
    after = lorafa_steps(As, Bs, gs, ms, vs, scalings, correction=correction, experts=experts, **options)
    outputs = [(A.clone(), *(t.clone() for t in layer)) for A, layer in zip(As, after, strict=True)]
    return (*outputs[0], *outputs[1], *adamw_step(other, other_g, other_m, other_v, **options))


OPERATION = Operation(
    name="lorafa_step",
    outputs=("A0", "B0", "m0", "v0", "A1", "B1", "m1", "v1", "other", "other_m", "other_v"),
    arguments=arguments,
    reference=reference,
    never_zero=("As",),
)
