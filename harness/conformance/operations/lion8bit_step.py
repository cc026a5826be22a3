"""lion8bit_step: one step of Lion. Its moment is stored as 8-bit codes with an absmax per block of 256."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.drawing.factors import Beta, Factor, LearningRate, Shape, WeightDecay
from harness.conformance.operation import Arguments, Operation, cloned
from harness.conformance.operations import adamw8bit_step
from harness.conformance.operations.adamw8bit_step import judge_absmax, judge_moment
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import CODE_TIE_EPS, EPSILON
from reference.operations import adamw8bit, lion8bit
from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map

State = Annotated[str, Factor(("trained", "zero"))]


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Shape,
    state: State = "trained",
    weight_decay: WeightDecay = 0.0,
    beta1: Beta = 0.9,
    beta2: Beta = 0.99,
    gradient: adamw8bit_step.Gradient = "dense",
    lr: LearningRate = 0.1,
) -> Arguments:
    """Draw a parameter, its gradient, and the codes and the absmax of its moment.

    state: `zero` is the state before the first step. gradient: `sparse` makes gradient and moment zero in every second
    block, and at every second element of the other blocks. `small` makes them 1e-5 times as large. By default, lr is so
    large that a step is nearly as large as the parameter.
    """
    step = 2 if state == "trained" else 1
    given = adamw8bit_step.arguments(dtype, generator, shape=shape, step=step, gradient=gradient)
    kept = {name: given[name] for name in ("p", "g", "m", "m_absmax")}
    return {**kept, "lr": lr, "betas": (beta1, beta2), "weight_decay": weight_decay}


def reference(p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, m and m_absmax after the step. options: lr, betas and weight_decay."""
    return lion8bit.lion8bit_step(p, g, m, m_absmax, **options)


def judge(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge p by `noise_floor` in its dtype, and the absmax by `noise_floor` in float32.

    If beta1 m + (1 - beta1) g is within a few rounding errors of 0, its sign is uncertain. Then p may go up, go down or
    stay.
    """
    dtype = given["p"].dtype
    own = next(name for name, one in DTYPES.items() if one == dtype)
    exactly, roundly = (OPERATION.named(reference(**cloned(given, {dtype: to})))["p"] for to in (torch.float64, dtype))
    mine, near = outputs["p"].double(), _is_near_zero(given)
    staying = (1 - given["lr"] * given["weight_decay"]) * given["p"].double()
    choices = torch.stack([staying + given["lr"] * move for move in (-1, 0, 1)])
    nearest = choices.gather(0, (choices - mine).abs().nan_to_num(0.0).argmin(dim=0, keepdim=True))[0]
    truth, rounded = (torch.where(near, nearest, one.double()) for one in (exactly, roundly))
    of_p = noise_floor({"p": outputs["p"]}, {"p": truth}, {"p": rounded.to(dtype)}, own)
    return worst_of([of_p, judge_absmax(outputs, "m", *_terms(given, 1))], "noise-floor"), ""


def judge_codes_of_moment(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge every code of the moment m as `adamw8bit_step.judge_moment` does."""
    return judge_moment(outputs, "m", *_terms(given, 1), signed=True)


def _is_near_zero(given: Arguments) -> Tensor:
    """Return a mask of the elements where the two terms of beta1 m + (1 - beta1) g nearly cancel. False if both are 0."""
    decayed, new = _terms(given, 0)
    size = decayed.abs() + new.abs()
    near: Tensor = ((decayed + new).abs() <= CODE_TIE_EPS * EPSILON["float32"] * size) & (size > 0)
    return near.view(given["p"].shape)


def _terms(given: Arguments, which: int) -> tuple[Tensor, Tensor]:
    """Return beta m and (1 - beta) g, flat in float64. which: 0 to use beta1, 1 to use beta2."""
    beta, g = given["betas"][which], given["g"].double().flatten()
    m = dequantize_blockwise(given["m"], given["m_absmax"], dynamic_map(signed=True), adamw8bit.BLOCK).double()
    return beta * m, (1 - beta) * g


OPERATION = Operation(
    name="lion8bit_step",
    outputs=("p", "m", "m_absmax"),
    arguments=arguments,
    reference=reference,
    judge=judge,
    codes=judge_codes_of_moment,
    rounded_once_in_16_bits=("p",),
)
