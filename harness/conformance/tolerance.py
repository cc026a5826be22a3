"""The tolerance policies: how far a tensor may be from the float64 reference. Their numbers are in `harness/tolerances`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.tolerances import EPSILON, FLOAT64_FLOOR_EPS, NOISE_FACTOR, NOISE_FLOOR_EPS


@dataclass(frozen=True)
class Judgement:
    """The worst tensor of an observation. error and allowed are relative: ||a - b|| / ||b||, Frobenius."""

    passed: bool
    error: float | None
    allowed: float | None
    tensor: str
    worst: str
    policy: str
    nonfinite: int

    @property
    def ratio(self) -> float:
        """How much of the allowance is used; infinite for a non-finite error."""
        if self.error is None:
            return float("inf")
        return self.error / self.allowed if self.allowed else (0.0 if self.passed else float("inf"))


def noise_floor(
    subject: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    dtype: str,
    factor: float = NOISE_FACTOR,
) -> Judgement:
    """Judge against what the reference itself loses in the subject's dtype.

    truth: the reference in float64; rounded: the reference in `dtype`. For each tensor
    err(subject) <= factor * err(rounded) + floor * eps(dtype). Missing or surplus tensors fail.
    """
    floor = FLOAT64_FLOOR_EPS if dtype == "float64" else NOISE_FLOOR_EPS
    policy = f"noise-floor: {factor:g} x reference in {dtype} + {floor:g} eps"
    if odd := sorted(set(subject) ^ set(truth)):
        return Judgement(False, None, None, odd[0], "present on one side only", policy, 0)
    judged = []
    for name, expected in truth.items():
        allowed = factor * _relative_error(rounded[name], expected) + floor * EPSILON[dtype]
        judged.append(_judge(name, subject[name], expected, allowed, policy))
    return worst_of(judged, policy)


def exact(subject: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Judgement:
    """Judge bitwise equality of values (0.0 and -0.0 are equal, NaN is not)."""
    if odd := sorted(set(subject) ^ set(expected)):
        return Judgement(False, None, None, odd[0], "present on one side only", "exact", 0)
    return worst_of([_judge(name, subject[name], e, 0.0, "exact") for name, e in expected.items()], "exact")


def worst_of(judged: list[Judgement], policy: str) -> Judgement:
    """Return the judgement that uses most of its allowance; an observation of nothing fails."""
    if not judged:
        return Judgement(False, None, None, "", "nothing was observed", policy, 0)
    worst = max(judged, key=lambda j: (not j.passed, j.ratio))
    return replace(worst, nonfinite=sum(j.nonfinite for j in judged))


def _relative_error(value: Tensor, truth: Tensor) -> float:
    reference = truth.detach().double()
    error = torch.linalg.vector_norm(value.detach().double() - reference)
    scale = torch.linalg.vector_norm(reference)
    return float(error / scale) if scale > 0 else float(error)


def _judge(name: str, value: Tensor, truth: Tensor, allowed: float, policy: str) -> Judgement:
    if value.shape != truth.shape:
        shapes = f"shape {tuple(value.shape)}, should be {tuple(truth.shape)}"
        return Judgement(False, None, allowed, name, shapes, policy, 0)
    value, truth = value.detach(), truth.detach()
    nonfinite = int((~torch.isfinite(value)).sum())
    difference = (value.double() - truth.double()).abs().nan_to_num(nan=torch.inf)
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)] if difference.numel() else []
    worst = (
        f"{where}: {float(value[tuple(where)]):.9g}, should be {float(truth[tuple(where)]):.9g}"
        if difference.numel()
        else ""
    )
    if nonfinite:
        return Judgement(False, None, allowed, name, worst, policy, nonfinite)
    error = _relative_error(value, truth)
    return Judgement(error <= allowed, error, allowed, name, worst, policy, 0)
