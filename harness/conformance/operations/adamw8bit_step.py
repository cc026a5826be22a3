"""adamw8bit_step: one step of AdamW. Both moments are stored as 8-bit codes with an absmax per block of 256."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from harness.conformance.comparison.quantised_codes import judge_codes, largest_of_blocks
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.drawing.factors import Beta, Eps, Factor, FirstStep, LearningRate, Shape, WeightDecay
from harness.conformance.operation import Arguments, Operation, cloned, draw, mapped
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import CODE_TIE_EPS, EPSILON
from reference.operations import adamw8bit
from reference.operations.dynamic_map import dynamic_map, quantize_blockwise

Gradient = Literal["dense", "sparse", "small", "zero"]
Parameter = Literal["normal", "large"]
LARGE = 64.0
"""Factor of a large parameter. LAMB's trust ratio is then far above 10, a bound that some programs give it."""
SMALL = 1e-5
"""Factor of small gradients and of their first moments. The second moments are SMALL^2 times as large, 1e-10."""
GradientDtype = Annotated[str, Factor(("as the parameter", "float32"), optional=True)]

_CODES = ("m", "v")


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Shape,
    step: FirstStep = 7,
    weight_decay: WeightDecay = 0.0,
    beta1: Beta = 0.9,
    beta2: Beta = 0.999,
    eps: Eps = 1e-8,
    gradient: Gradient = "dense",
    lr: LearningRate = 0.1,
    gradient_dtype: GradientDtype = "as the parameter",
    parameter: Parameter = "normal",
) -> Arguments:
    """Draw a parameter, its gradient and its moments. For step 1, the moments are zero.

    gradient_dtype: float32 is that of gradients which a program accumulates in float32 beside parameters in 16 bits.
    gradient: `sparse` makes gradient and moments zero in every second block, and at every second element of the other
    blocks. `small` makes them 1e-5 times as large, as in a model that is nearly trained. `zero` makes the gradient zero,
    as of an expert that no token reaches. parameter: `large` makes the parameter 64 times as large. By default, lr is so
    large that the step is as large as the parameter.
    """
    p, g = (draw(generator, dtype, *shape) for _ in range(2))
    m, v = (draw(generator, torch.float32, g.numel(), spread=0.1) for _ in range(2))
    p = LARGE * p if parameter == "large" else p
    if gradient == "small":
        g, m, v = SMALL * g, SMALL * m, SMALL * v
    if gradient == "zero":
        g = torch.zeros_like(g)
    if gradient == "sparse":
        number = torch.arange(g.numel())
        seen = (number % 2 == 0) & (number // adamw8bit.BLOCK % 2 == 0)
        g, m, v = g * seen.view(g.shape), m * seen, v * seen
    g = g.float() + draw(generator, torch.float32, *shape, spread=1e-3) if gradient_dtype == "float32" else g
    state = adamw8bit.init_state(p, min_8bit_size=0)
    if step > 1:
        state["m"], state["m_absmax"] = quantize_blockwise(m, dynamic_map(signed=True))
        state["v"], state["v_absmax"] = quantize_blockwise(v.square(), dynamic_map(signed=False))
    how = {"step": step, "lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    return {"p": p, "g": g, **state, **how}


def reference(
    p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, **how: Any
) -> tuple[Tensor, ...]:
    """Return p, m, m_absmax, v and v_absmax after the step. how: step, lr, betas, eps and weight_decay.

    Numbers of a whole step, such as 1 - beta^step, are computed in float64, as Python does.
    """
    state = {"m": m.clone(), "m_absmax": m_absmax.clone(), "v": v.clone(), "v_absmax": v_absmax.clone()}
    p = p.clone()
    adamw8bit.adamw8bit_step(p, g, state, **how)
    return p, state["m"], state["m_absmax"], state["v"], state["v_absmax"]


def judge(outputs: Mapping[str, Tensor], given: Arguments, operation: Operation | None = None) -> tuple[Judgement, str]:
    """Judge the parameter p by `noise_floor` in its dtype, and every absmax by `judge_absmax`.

    operation: the Operation whose outputs are judged, such as `lamb8bit_step`. By default, `adamw8bit_step`.
    """
    dtype, operation = given["p"].dtype, operation or OPERATION
    own = next(name for name, one in DTYPES.items() if one == dtype)
    exactly = operation.named(operation.reference(**cloned(given, {dtype: torch.float64})))
    judged = [noise_floor({"p": outputs["p"]}, {"p": exactly["p"]}, _draws_of_p(operation, given), own)]
    judged += [judge_absmax(outputs, name, *_parts(given, name)) for name in _CODES]
    return worst_of(judged, "noise-floor"), ""


def _draws_of_p(operation: Operation, given: Arguments) -> Iterator[dict[str, Tensor]]:
    """Yield p as the reference computes it in p's dtype.

    For LAMB in float32 and float64, also yield p as computed from strided tensors, whose norms torch sums in another
    order.
    """
    yield {"p": operation.named(operation.reference(**cloned(given)))["p"]}
    if operation is not OPERATION and given["p"].dtype in (torch.float32, torch.float64):
        strided = mapped(
            cloned(given), lambda one: torch.stack([one, one], -1)[..., 0] if isinstance(one, Tensor) else one
        )
        yield {"p": operation.named(operation.reference(**strided))["p"]}


def judge_absmax(outputs: Mapping[str, Tensor], name: str, decayed: Tensor, new: Tensor) -> Judgement:
    """Judge the absmax of a moment by `noise_floor` in float32, the dtype in which moments are computed.

    decayed, new: the two terms of the moment, beta x old moment and (1 - beta) x g or g^2, flat in float64.
    """
    constants, truth = f"{name}_absmax", largest_of_blocks(decayed + new, adamw8bit.BLOCK)
    # Rounding to float32 keeps the order of magnitudes.
    return noise_floor({constants: outputs[constants]}, {constants: truth}, {constants: truth.float()}, "float32")


def judge_both(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge every code of the moments m and v, as `judge_moment` does."""
    signed = {"m": True, "v": False}
    judged = [judge_moment(outputs, name, *_parts(given, name), signed=signed[name]) for name in _CODES]
    return worst_of([one for one, _ in judged], "exact"), "; ".join(detail for _, detail in judged)


def judge_moment(
    outputs: Mapping[str, Tensor], name: str, decayed: Tensor, new: Tensor, *, signed: bool
) -> tuple[Judgement, str]:
    """Judge every code of a moment: it must be the code of the moment computed in float64.

    If this moment is within a few rounding errors of the middle between two levels, the codes of both levels are right.
    decayed, new: the two terms of the moment, beta x old moment and (1 - beta) x g or g^2, flat in float64.
    """
    value, levels = decayed + new, dynamic_map(signed).to(new.device)
    codes, absmax = quantize_blockwise(value, levels)
    reach = CODE_TIE_EPS * EPSILON["float32"] * (decayed.abs() + new.abs())

    def near() -> Tensor:
        return near_middle(value, largest_of_blocks(value, adamw8bit.BLOCK), reach, levels.double())

    # The absmax is judged by `judge_absmax`; here it marks the blocks of zeros.
    mine = {"codes": outputs[name], "absmax": torch.where(absmax == 0, outputs[f"{name}_absmax"], absmax)}
    one, detail = judge_codes(mine, (codes, absmax), near, adamw8bit.BLOCK, levels)
    return replace(one, tensor=f"{name}: {one.tensor}"), f"{name}: {detail}"


def near_middle(value: Tensor, absmax: Tensor, reach: Tensor, levels: Tensor) -> Tensor:
    """Return a mask of the elements of `value` that are at most `reach` away from the middle between two levels.

    absmax: one number per block. The levels of a block are `levels` times the absmax of the block.
    """
    scale = absmax.repeat_interleave(adamw8bit.BLOCK)[: value.numel()]
    middles = (levels[:-1] + levels[1:]) / 2
    scaled = torch.where(scale == 0, 0.0, value / scale)
    above = torch.bucketize(scaled, middles).clamp(max=len(middles) - 1)
    gap = torch.minimum((scaled - middles[above]).abs(), (scaled - middles[(above - 1).clamp(min=0)]).abs())
    return gap * scale <= reach


def _parts(given: Arguments, name: str) -> tuple[Tensor, Tensor]:
    """Return the two parts of the new moment, flat in float64: beta x old moment, and (1 - beta) x g (x g^2 for v)."""
    which = _CODES.index(name)
    state = {key: given[key] for key in ("m", "m_absmax", "v", "v_absmax")}
    beta, g = given["betas"][which], given["g"].double().flatten()
    return beta * adamw8bit.moments(state, torch.float64)[which], (1 - beta) * g ** (which + 1)


OPERATION = Operation(
    name="adamw8bit_step",
    outputs=("p", "m", "m_absmax", "v", "v_absmax"),
    arguments=arguments,
    reference=reference,
    judge=judge,
    codes=judge_both,
    rounded_once_in_16_bits=("p",),
)
