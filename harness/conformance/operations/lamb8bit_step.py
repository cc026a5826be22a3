"""lamb8bit_step: one step of LAMB. Both moments are stored as 8-bit codes with an absmax per block of 256."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.conformance.comparison.tolerance_policies import Judgement
from harness.conformance.operation import Arguments, Operation
from harness.conformance.operations import adamw8bit_step
from reference.operations import lamb8bit


def reference(
    p: Tensor, g: Tensor, m: Tensor, m_absmax: Tensor, v: Tensor, v_absmax: Tensor, **how: Any
) -> tuple[Tensor, ...]:
    """Return p, m, m_absmax, v and v_absmax after the step. how: step, lr, betas, eps and weight_decay.

    Numbers of a whole step, such as 1 - beta^step, are computed in float64, as Python does.
    """
    state = {"m": m, "m_absmax": m_absmax, "v": v, "v_absmax": v_absmax}
    p, after = lamb8bit.lamb8bit_step(p, g, state, **how)
    return p, *(after[name] for name in state)


def judge(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge the parameter p and every absmax, as `adamw8bit_step.judge` does."""
    return adamw8bit_step.judge(outputs, given, OPERATION)


OPERATION = Operation(
    name="lamb8bit_step",
    outputs=("p", "m", "m_absmax", "v", "v_absmax"),
    arguments=adamw8bit_step.arguments,
    reference=reference,
    judge=judge,
    codes=adamw8bit_step.judge_both,
    rounded_once_in_16_bits=("p",),
    without_norm=adamw8bit_step.reference,
)
