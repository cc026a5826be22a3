"""Tolerance policies: how far a tensor may be from the float64 reference, by the numbers of `tolerance_constants`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from harness.conformance.tolerance_constants import (
    BIAS_SIGMAS,
    CARRIED_FACTOR,
    CEILING,
    DOUBLE_ROUNDED_SHARE,
    EPSILON,
    FEW_NUMBERS,
    LARGEST_EPS,
    LARGEST_FACTOR,
    NOISE_FACTOR,
    NOISE_FLOOR_EPS,
)

ROUNDED_SUMS = ("float32", "float64")
"""Dtypes in which a sum is rounded at every term. Numbers of 16 bits are summed in float32."""


@dataclass(frozen=True)
class Judgement:
    """Result of a comparison: whether all tensors passed, and the tensor that uses most of its allowance."""

    passed: bool
    error: float | None
    """Error in the norm that `policy` names; None if the error is not finite or nothing could be compared."""
    allowed: float | None
    tensor: str
    worst: str
    """The worst element, or the reason why the tensor cannot be compared."""
    policy: str
    nonfinite: int
    """Number of elements that are NaN or infinite."""
    decided: bool = True
    """False if the reference itself is too inaccurate to judge by; `worst` then has the reason."""

    @property
    def ratio(self) -> float:
        """The error as a share of the allowance; infinite for a non-finite error."""
        if self.error is None:
            return float("inf")
        return self.error / self.allowed if self.allowed else (0.0 if self.passed else float("inf"))


def noise_floor(
    subject: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    dtype: str,
    factor: float = NOISE_FACTOR,
) -> Judgement:
    """Judge the subject's errors by the errors of the reference itself in the subject's dtype.

    truth: the reference in float64. rounded: the reference in `dtype`, or several draws of its error. The largest draw
    counts, and no more draws are made once the judgement passes. Three errors of each tensor must stay within a
    multiple of the reference's own errors plus a floor in units of eps: the relative Frobenius norm of the difference;
    the largest element of the difference, relative to the root mean square, which reveals one wrong element among many;
    and the projection of the difference on the truth, which reveals a slightly wrong factor, because rounding hardly
    changes it. Missing or surplus tensors fail. A tensor is not judged if the reference's own error may exceed the share
    CEILING of the tensor.
    """
    policy = f"noise-floor: {factor:g} x reference in {dtype} + {NOISE_FLOOR_EPS[dtype]:g} eps"
    if odd := sorted(set(subject) ^ set(truth)):
        return Judgement(False, None, None, odd[0], "present on one side only", policy, 0)
    return _by_draws(rounded, truth, policy, lambda drawn: _within_noise(subject, truth, drawn, dtype, factor, policy))


def _by_draws(
    rounded: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    truth: Mapping[str, Tensor],
    policy: str,
    judge: Callable[[Sequence[Mapping[str, _Error]]], Judgement],
) -> Judgement:
    """Judge after each draw, by the errors of all draws so far, and make no more draws once the judgement passes."""
    drawn: list[dict[str, _Error]] = []
    verdict = worst_of([], policy)
    for draw in [rounded] if isinstance(rounded, Mapping) else rounded:
        drawn.append({name: _Error.of(draw[name], expected) for name, expected in truth.items()})
        verdict = judge(drawn)
        if verdict.passed:
            break
    return verdict


def _within_noise(
    subject: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    drawn: Sequence[Mapping[str, _Error]],
    dtype: str,
    factor: float,
    policy: str,
) -> Judgement:
    floor = NOISE_FLOOR_EPS[dtype]
    judged, lost = [], []
    for name, expected in truth.items():
        errors, eps = [errors_of[name] for errors_of in drawn], EPSILON[dtype]
        own = _largest(errors)
        # Decide this by the first draw alone, the reference's own: a later draw must not excuse a tensor that fails.
        undecided = not factor * errors[0].norm + floor * eps <= CEILING  # also where the reference overflows
        if (refused := _incomparable(name, subject[name], expected, policy, undecided)) is not None:
            judged.append(refused)
            continue
        if undecided:
            lost.append(name)
            continue
        have, wide = _Error.of(subject[name], expected), _factor(factor, expected)
        bias = wide * own.share + BIAS_SIGMAS * (own.norm + eps) / max(1, expected.numel()) ** 0.25
        for error, allowed, measure in (
            (have.norm, min(wide * own.norm + floor * eps, CEILING), ""),
            (have.largest, LARGEST_FACTOR * (wide * own.largest + LARGEST_EPS * floor * eps), ", largest element"),
            (have.share, bias + (floor * eps if dtype in ROUNDED_SUMS else 0.0), ", share of the truth"),
        ):
            judged.append(Judgement(error <= allowed, error, allowed, name, "", policy + measure, 0))
    return (
        _undecidable(lost, dtype, policy)
        if lost and not judged
        else _with_worst_element(worst_of(judged, policy), subject, truth)
    )


def carried_noise(
    subject: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    dtype: str,
    factor: float = CARRIED_FACTOR,
) -> Judgement:
    """Judge tensors that passed through many layers, as `noise_floor` judges those of one layer.

    All following layers carry and amplify the rounding of one layer, and a whole tensor grows or shrinks with it. So the
    projection on the truth is not judged. Also, the reference's error of one tensor is a single draw of noise: if the
    median over all tensors is larger, the median replaces it. rounded: as in `noise_floor`.
    """
    policy = f"carried-noise: {factor:g} x reference in {dtype} + {NOISE_FLOOR_EPS[dtype]:g} eps"
    if odd := sorted(set(subject) ^ set(truth)):
        return Judgement(False, None, None, odd[0], "present on one side only", policy, 0)
    return _by_draws(
        rounded, truth, policy, lambda drawn: _within_carried(subject, truth, drawn, dtype, factor, policy)
    )


def _within_carried(
    subject: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    drawn: Sequence[Mapping[str, _Error]],
    dtype: str,
    factor: float,
    policy: str,
) -> Judgement:
    own = {name: _largest([errors[name] for errors in drawn]) for name in truth}
    # Decide this by the first draw alone, as in `noise_floor`; also where the reference overflows.
    lost = [name for name, one in drawn[0].items() if not factor * one.norm <= CEILING]
    kept = [one for name, one in own.items() if name not in lost]
    usual = [median([getattr(one, measure) for one in kept] or [0.0]) for measure in ("norm", "largest")]
    judged = []
    for name, expected in truth.items():
        if (refused := _incomparable(name, subject[name], expected, policy, name in lost)) is not None:
            judged.append(refused)
            continue
        if name in lost:
            continue
        have, floor = _Error.of(subject[name], expected), NOISE_FLOOR_EPS[dtype] * EPSILON[dtype]
        wide = _factor(factor, expected)
        for error, allowed, measure in (
            (have.norm, wide * max(own[name].norm, usual[0]) + floor, ""),
            (
                have.largest,
                LARGEST_FACTOR * (wide * max(own[name].largest, usual[1]) + LARGEST_EPS * floor),
                ", largest element",
            ),
        ):
            judged.append(Judgement(error <= allowed, error, allowed, name, "", policy + measure, 0))
    return (
        _undecidable(lost, dtype, policy)
        if lost and not judged
        else _with_worst_element(worst_of(judged, policy), subject, truth)
    )


def exact(subject: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Judgement:
    """Judge bitwise equality of values (0.0 and -0.0 are equal, so are equal infinities; NaN is not)."""
    if odd := sorted(set(subject) ^ set(expected)):
        return Judgement(False, None, None, odd[0], "present on one side only", "exact", 0)
    judged = []
    for name, want in expected.items():
        have = subject[name]
        # Not decided by the norm: that of a tiny difference may underflow.
        if have.shape == want.shape and bool((have.detach().double() == want.detach().double()).all()):
            judged.append(Judgement(True, 0.0, 0.0, name, "", "exact", 0))
            continue
        refused = _incomparable(name, have, want, "exact")
        judged.append(refused or Judgement(False, _Error.of(have, want).norm, 0.0, name, "", "exact", 0))
    return _with_worst_element(worst_of(judged, "exact"), subject, expected)


def rounded_once(subject: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Judgement:
    """Judge 16-bit tensors by the share of their elements that are not the float64 truth, correctly rounded.

    The error is this share. A program that rounds once more, or rounds in another way, may have a small Frobenius error.
    """
    policy, judged = f"rounded once: share of other elements at most {DOUBLE_ROUNDED_SHARE:g} + 1 / n", []
    for name, value in subject.items():
        expected = truth[name].to(value.dtype)
        off = float((value != expected).double().mean()) if value.numel() else 0.0
        allowed = DOUBLE_ROUNDED_SHARE + 1 / max(1, value.numel())
        judged.append(Judgement(off <= allowed, off, allowed, name, "", policy, 0))
    return _with_worst_element(worst_of(judged, policy), subject, truth)


def unchanged(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Judgement:
    """Judge bitwise equality as `exact` does, and equal dtypes."""
    for name in now.keys() & before.keys():
        if now[name].dtype != before[name].dtype:
            dtypes = f"{now[name].dtype}, should be {before[name].dtype}"
            return Judgement(False, None, None, name, dtypes, "exact", 0)
    return exact(now, before)


def worst_of(judged: list[Judgement], policy: str) -> Judgement:
    """Return the judgement that uses most of its allowance, with the total of non-finite elements.

    An undecided judgement counts only if all are undecided. Without any judgement, the result is a failure.
    """
    if not judged:
        return Judgement(False, None, None, "", "nothing was observed", policy, 0)
    worst = max([j for j in judged if j.decided] or judged, key=lambda j: (not j.passed, j.ratio))
    return replace(worst, nonfinite=sum(j.nonfinite for j in judged))


def perturbed(value: Tensor, dtype: str, generator: torch.Generator) -> Tensor:
    """Return `value` with each element moved by up to half a unit in the last place of `dtype`; integers are unchanged."""
    if not value.is_floating_point():
        return value
    moves = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device) - 0.5
    return (value.double() * (1 + EPSILON[dtype] * moves)).to(value.dtype)


def rows_within(value: Tensor, truth: Tensor, draws: Iterable[Tensor], dtype: str) -> Tensor:
    """Return a mask (T,) of the rows of `value` (T, E) within the noise floor of `truth`. draws: see `noise_floor`."""

    def off(some: Tensor) -> Tensor:
        difference: Tensor = torch.linalg.vector_norm(some.detach().double() - truth.double(), dim=-1)
        return difference

    length = torch.linalg.vector_norm(truth.double(), dim=-1)
    own = torch.stack([off(draw) for draw in draws]).amax()  # a single row may happen to round to nothing
    floor = LARGEST_EPS * NOISE_FLOOR_EPS[dtype]
    within: Tensor = off(value) <= NOISE_FACTOR * own + floor * EPSILON[dtype] * length
    return within


def _undecidable(lost: Sequence[str], dtype: str, policy: str) -> Judgement:
    why = f"the reference itself loses {', '.join(lost[:3])} in {dtype}"
    return Judgement(False, None, None, "", why, policy, 0, decided=False)


def _factor(factor: float, tensor: Tensor) -> float:
    """Return the factor on the reference's own error for `tensor`; it is larger for a tensor of few numbers."""
    return factor * (1 + FEW_NUMBERS / max(1, tensor.numel()))


def _largest(errors: Sequence[_Error]) -> _Error:
    return _Error(*(max(getattr(e, m) for e in errors) for m in ("norm", "largest", "share")))


@dataclass(frozen=True)
class _Error:
    """Distance of a tensor from the truth, relative to the truth's norm."""

    norm: float
    """Norm of the difference."""
    largest: float
    """Largest element of the difference, times the root of the number of elements."""
    share: float
    """Projection of the difference on the truth."""

    @classmethod
    def of(cls, value: Tensor, truth: Tensor) -> _Error:
        want = truth.detach().double()
        if not want.numel():
            return cls(0.0, 0.0, 0.0)
        top = float(want.abs().max())
        unit = top if 0 < top < math.inf else 1.0  # squares of numbers below 1e-154 are 0
        difference, want = (value.detach().double() - want) / unit, want / unit
        scale = float(torch.linalg.vector_norm(want)) or 1.0
        return cls(
            norm=float(torch.linalg.vector_norm(difference)) / scale,
            largest=float(difference.abs().max()) * want.numel() ** 0.5 / scale,
            share=abs(float((difference * want).sum())) / scale**2,
        )


def _incomparable(name: str, value: Tensor, truth: Tensor, policy: str, undecided: bool = False) -> Judgement | None:
    """Return a failure for a tensor with a wrong shape or with elements that are not finite; otherwise None.

    undecided: True if the reference itself is too inaccurate in this dtype. If it overflows, the subject may be infinite.
    """
    if value.shape != truth.shape:
        shapes = f"shape {tuple(value.shape)}, should be {tuple(truth.shape)}"
        return Judgement(False, None, None, name, shapes, policy, 0)
    nonfinite = int((~torch.isfinite(value)).sum())
    if nonfinite and not undecided:
        return Judgement(False, None, None, name, _describe_worst_element(value, truth), policy, nonfinite)
    return None


def _with_worst_element(judgement: Judgement, subject: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Judgement:
    """Describe the worst element of the judgement's tensor in the judgement, and return it.

    Describing the worst element of every tensor would take too long.
    """
    if judgement.worst or judgement.tensor not in truth:
        return judgement
    return replace(judgement, worst=_describe_worst_element(subject[judgement.tensor], truth[judgement.tensor]))


def _describe_worst_element(value: Tensor, truth: Tensor) -> str:
    """Return the index of the element with the largest difference, its value and its expected value."""
    difference = (value.detach().double() - truth.detach().double()).abs().nan_to_num(nan=torch.inf)
    if not difference.numel():
        return ""
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return f"{list(where)}: {float(value.detach()[where]):.9g}, should be {float(truth.detach()[where]):.9g}"
