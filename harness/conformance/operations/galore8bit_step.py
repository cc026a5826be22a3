"""galore8bit_step: one step of GaLore with given projection matrices. Moments are 8-bit codes with an absmax per block
of 256.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.quantised_codes import judge_codes, largest_of_blocks
from harness.conformance.comparison.tolerance_policies import ROUNDED_SUMS, Judgement, noise_floor, worst_of
from harness.conformance.operation import Arguments, Operation, cloned
from harness.conformance.operations import galore_step
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import CODE_TIE_EPS, EPSILON, REORDERED_DRAWS, REORDERED_ULPS
from reference import galore
from reference.operations import adamw8bit
from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise

_SIGNED = {"M": True, "V": False}


@wraps(galore_step.arguments)  # so that it has the same settings
def arguments(dtype: torch.dtype, generator: torch.Generator, **case: Any) -> Arguments:
    """Draw the arguments of `galore_step`, with codes and absmax in the place of each moment."""
    given = galore_step.arguments(dtype, generator, **case)
    for name, signed in _SIGNED.items():
        given[name], given[f"{name}_absmax"] = quantize_blockwise(given[name], dynamic_map(signed))
    return given


def reference(
    W: Tensor,
    G: Tensor,
    P: Tensor | None,
    Q: Tensor | None,
    *,
    step: int,
    betas: tuple[float, float],
    **further: Any,
) -> tuple[Tensor, ...]:
    """Return W, M, M_absmax, V and V_absmax after step number `step`.

    further: M, M_absmax, V and V_absmax before the step, and side, lr, scale, eps and weight_decay.
    """
    bases = {name: t for name, t in (("P", P), ("Q", Q)) if t is not None}
    codes = {name: further.pop(name).clone() for name in OPERATION.outputs[1:]}
    W = W.clone()
    rank = min(t.shape[1] for t in bases.values())
    state = {"step": step - 1, **codes, **bases}
    how: Arguments = {"rank": rank, "update_gap": galore_step.NEVER, "beta1": betas[0], "beta2": betas[1]}
    galore.galore_step(W, G, state, given=galore.Projector(P, Q), **how, **further)
    return W, *codes.values()


def judge(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge W and every absmax by `noise_floor` in W's dtype.

    If W is float64, every absmax is stored in float32 and is judged in float32. Plausible results also include those for a
    slightly moved gradient, because its projection may be summed in another order.
    """
    dtype = given["W"].dtype
    own = next(name for name, one in DTYPES.items() if one == dtype)

    @cache
    def step(seed: int | None) -> dict[str, Tensor]:
        """Take the step in W's dtype, with the gradient moved at random, or as it is if seed is None."""
        generator = torch.Generator().manual_seed(seed or 0)
        G = given["G"] if seed is None else perturbed(given["G"], own, generator, REORDERED_ULPS)
        return OPERATION.named(reference(**cloned(given | {"G": G})))

    def plausible(name: str) -> Iterator[Mapping[str, Tensor]]:
        seeds = [None, *range(REORDERED_DRAWS if own in ROUNDED_SUMS else 0)]
        yield from ({name: step(seed)[name]} for seed in seeds)

    # Even a float64 step stores every absmax in float32.
    exactly = OPERATION.named(reference(**cloned(given, {dtype: torch.float64})))
    judged = [noise_floor({"W": outputs["W"]}, {"W": exactly["W"]}, plausible("W"), own)]
    for name in _SIGNED:
        absmax = f"{name}_absmax"
        decayed, new, _ = _parts(given, name)
        truth = {absmax: largest_of_blocks(decayed + new, adamw8bit.BLOCK)}
        narrow = "float32" if own == "float64" else own
        judged.append(noise_floor({absmax: outputs[absmax]}, truth, plausible(absmax), narrow))
    return worst_of(judged, "noise-floor"), ""


def judge_codes_of_moments(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge every code: it must be the code of a number within some rounding errors of the float64 moment.

    Unlike in `adamw8bit_step`, the new part of a moment comes from a matrix product. The product is rounded in the
    gradient's dtype, and so is the absmax of the block. Near zero, where levels are dense, several codes may be right.
    """
    eps = max(torch.finfo(given["W"].dtype).eps, EPSILON["float32"])
    judged, details = [], []
    for name, signed in _SIGNED.items():
        decayed, new, bound = _parts(given, name)
        value, levels = decayed + new, dynamic_map(signed).to(new.device)
        codes, absmax = quantize_blockwise(value, levels)
        in_block = _repeat_blocks(largest_of_blocks(bound, adamw8bit.BLOCK), value)
        reach = CODE_TIE_EPS * (EPSILON["float32"] * (decayed.abs() + new.abs()) + eps * in_block)
        scale, middles = (
            _repeat_blocks(largest_of_blocks(value, adamw8bit.BLOCK), value),
            (levels[1:] + levels[:-1]).double() / 2,
        )
        least, most = (torch.bucketize((value + sign * reach) / scale, middles) for sign in (-1, 1))
        within = (outputs[name] >= least) & (outputs[name] <= most)
        # `judge` compares the absmax. Here it marks the blocks of zeros.
        mine = {
            "codes": torch.where(within, codes, outputs[name]),
            "absmax": torch.where(absmax == 0, outputs[f"{name}_absmax"], absmax),
        }
        one, _ = judge_codes(mine, (codes, absmax), partial(torch.zeros_like, within), adamw8bit.BLOCK, levels)
        judged.append(replace(one, tensor=f"{name}: {one.tensor}"))
        details.append(f"{name}: {int((within & (outputs[name] != codes)).sum())} codes differ within rounding")
    return worst_of(judged, "exact"), "; ".join(details)


def _repeat_blocks(numbers: Tensor, value: Tensor) -> Tensor:
    """Expand `numbers`, which has one entry per block of `value`, to one entry per element of `value`."""
    return numbers.repeat_interleave(adamw8bit.BLOCK)[: value.numel()]


def _parts(given: Arguments, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return three flat float64 tensors: beta x the old moment, (1 - beta) x R (R^2 for V), and a bound.

    R is the projected gradient. The bound limits the rounding error of the second tensor, in units of eps. For M, the
    bound is (1 - beta) |P|^T |G| |Q|. For V, it is 2 |R| times as large.
    """
    power, signed = (1, True) if name == "M" else (2, False)
    beta = given["betas"][power - 1]
    moment = dequantize_blockwise(given[name], given[f"{name}_absmax"], dynamic_map(signed)).double()
    basis = galore.Projector(*(t if t is None else t.double() for t in (given["P"], given["Q"])))
    sizes = galore.Projector(*(t if t is None else t.abs() for t in (basis.P, basis.Q)))
    R, bound = galore.project(given["G"].double(), basis), galore.project(given["G"].double().abs(), sizes)
    bound = bound if power == 1 else 2 * R.abs() * bound
    return beta * moment, (1 - beta) * R.flatten() ** power, (1 - beta) * bound.flatten()


OPERATION = Operation(
    name="galore8bit_step",
    outputs=("W", "M", "M_absmax", "V", "V_absmax"),
    arguments=arguments,
    reference=reference,
    judge=judge,
    codes=judge_codes_of_moments,
    never_zero=("P", "Q"),
)
