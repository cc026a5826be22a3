"""Rules that decide how far a tensor may be from the float64 reference.

The numbers in these rules are in `tolerance_constants`. A plausible result, or draw, is one that a correct program may
compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from harness.conformance.comparison.distances import Distance, Distances, describe_worst_element
from harness.conformance.tolerance_constants import (
    BIAS_SIGMAS,
    CARRIED_FACTOR,
    CEILING,
    DOUBLE_ROUNDED_SHARE,
    EPSILON,
    FEW_NUMBERS,
    HOPELESS,
    LARGEST_EPS,
    LARGEST_FACTOR,
    MIDDLE_ULPS,
    NOISE_FACTOR,
    NOISE_FLOOR_EPS,
    PERTURBED_DRAWS,
    SUBNORMAL_STEPS,
)

_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
"""Dtypes that every supported torch version compares without conversion."""
ROUNDED_SUMS = ("float32", "float64")
"""Dtypes in which a sum is rounded at every term. 16-bit numbers are summed in float32 instead."""


@dataclass(frozen=True)
class Judgement:
    """Result of a comparison: whether all tensors passed, and details of the worst one.

    The worst tensor has the largest ratio of error to allowed error.
    """

    passed: bool
    error: float | None
    """Error of `tensor`, in the norm that `policy` names. None if the error is not finite or nothing could be
    compared."""
    allowed: float | None
    tensor: str
    """Name of the worst tensor."""
    worst: str
    """Description of the worst element of `tensor`, or the reason why the tensor cannot be compared."""
    policy: str
    nonfinite: int
    """Number of elements that are NaN or infinite."""
    decided: bool = True
    """False if the reference itself is too inaccurate for a decision. `worst` then has the reason."""

    @property
    def ratio(self) -> float:
        """The error divided by the allowed error. Infinite if the error is not finite."""
        if self.error is None:
            return float("inf")
        return self.error / self.allowed if self.allowed else (0.0 if self.passed else float("inf"))


def noise_floor(
    subject: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    dtype: str,
    factor: float = NOISE_FACTOR,
    *,
    jumps: bool = False,
) -> Judgement:
    """Judge the subject's errors by the errors that the reference makes in the subject's dtype.

    truth: tensors of the reference in float64. rounded: tensors of the reference in `dtype`, or several plausible
    results. If there are several, the largest of their errors is used, and no further result is computed once the
    judgement passes. jumps: True if a tiny rounding error may change the result a lot, because a quantiser follows it.

    Three errors of each tensor are judged. Each may be a multiple of the reference's own error plus a floor in units of
    eps. The floor grows with `factor` in dtypes that round every term of a sum. The first error is the relative Frobenius
    norm of the difference. The second is the largest element of the difference, relative to the root mean square: it
    reveals one wrong element among many. The third is the projection of the difference on the truth: it reveals a
    slightly wrong factor, because rounding hardly changes this projection.

    A missing or surplus tensor fails. A tensor is not judged if `factor` times the reference's error, plus the floor,
    exceeds the share CEILING of the tensor's norm. Subnormal numbers have fewer digits, so an error of a few times the
    smallest one is allowed in addition.
    """
    policy = f"noise-floor: {factor:g} x reference in {dtype} + {_floor_eps(dtype, factor / NOISE_FACTOR):g} eps"
    if (odd := _one_sided(subject, truth, policy)) is not None:
        return odd
    distances = Distances(subject, truth)
    return _by_draws(
        rounded,
        distances,
        policy,
        lambda drawn: _within_noise(subject, distances, drawn, dtype, factor, policy),
        jumps=jumps,
    )


def _by_draws(
    rounded: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    distances: Distances,
    policy: str,
    judge: Callable[[Sequence[Mapping[str, Distance]]], Judgement],
    *,
    jumps: bool = False,
) -> Judgement:
    """Judge with one draw, then with two and so on, and return the first judgement that passes.

    The errors of the draws decide how large the subject's errors may be. If no judgement passes, return the last one.
    Unless `jumps`, stop early if the subject's error is too large to be explained by further draws.
    """
    drawn: list[dict[str, Distance]] = []
    verdict = worst_of([], policy)
    for draw in [rounded] if isinstance(rounded, Mapping) else rounded:
        drawn.append({name: distances.of(name, draw[name]) for name in distances.truth})
        verdict = judge(drawn)
        if verdict.passed or (not jumps and len(drawn) > PERTURBED_DRAWS and verdict.ratio > HOPELESS):
            break
    return verdict


def _within_noise(
    subject: Mapping[str, Tensor],
    distances: Distances,
    drawn: Sequence[Mapping[str, Distance]],
    dtype: str,
    factor: float,
    policy: str,
) -> Judgement:
    floor, truth = _floor_eps(dtype, factor / NOISE_FACTOR), distances.truth
    judged, lost = [], []
    for name, expected in truth.items():
        errors, eps = [errors_of[name] for errors_of in drawn], EPSILON[dtype]
        own = _largest(errors)
        # Decide this by the first draw alone, the reference's own: a later draw must not excuse a tensor that fails.
        undecided = not factor * errors[0].norm + floor * eps <= CEILING  # true also where the reference overflows
        if (refused := _incomparable(name, subject[name], expected, policy, undecided)) is not None:
            judged.append(refused)
            continue
        if undecided:
            lost.append(name)
            continue
        have, wide = distances.of_subject(name), _factor(factor, expected)
        step = _subnormal(subject[name], distances.size(name))
        bias = wide * own.share + BIAS_SIGMAS * (own.norm + eps) / max(1, expected.numel()) ** 0.25
        for error, allowed, measure in (
            (have.norm, min(wide * own.norm + floor * eps + step, CEILING), ""),
            (
                have.largest,
                LARGEST_FACTOR * (wide * own.largest + LARGEST_EPS * floor * eps + step),
                ", largest element",
            ),
            (have.share, bias + (floor * eps if dtype in ROUNDED_SUMS else 0.0) + step, ", share of the truth"),
        ):
            judged.append(Judgement(error <= allowed, error, allowed, name, "", policy + measure, 0))
    return (
        _undecidable(lost, dtype, policy)
        if lost and not judged
        else _with_worst_element(worst_of(judged, policy), subject, truth)
    )


def _subnormal(tensor: Tensor, size: float) -> float:
    """Return SUBNORMAL_STEPS times the smallest positive number of the tensor's dtype, as a share of `size`."""
    if not tensor.is_floating_point() or not size:
        return 0.0
    limits = torch.finfo(tensor.dtype)
    return SUBNORMAL_STEPS * limits.smallest_normal * limits.eps / size


def carried_noise(
    subject: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    dtype: str,
    factor: float = CARRIED_FACTOR,
) -> Judgement:
    """Judge tensors that passed through many layers. The rule is that of `noise_floor`, with two exceptions.

    First, the projection on the truth is not judged, because later layers amplify rounding errors so that a whole
    tensor may grow or shrink. Second, the reference's error in a single tensor may happen to be small. If the median of
    the errors over all tensors is larger, the median is used instead. rounded: tensors of the reference in `dtype`, or
    several plausible results.
    """
    policy = f"carried-noise: {factor:g} x reference in {dtype} + {_floor_eps(dtype, factor / CARRIED_FACTOR):g} eps"
    if (odd := _one_sided(subject, truth, policy)) is not None:
        return odd
    distances = Distances(subject, truth)
    return _by_draws(
        rounded, distances, policy, lambda drawn: _within_carried(subject, distances, drawn, dtype, factor, policy)
    )


def _within_carried(
    subject: Mapping[str, Tensor],
    distances: Distances,
    drawn: Sequence[Mapping[str, Distance]],
    dtype: str,
    factor: float,
    policy: str,
) -> Judgement:
    truth = distances.truth
    own = {name: _largest([errors[name] for errors in drawn]) for name in truth}
    # As in `noise_floor`, the first draw alone decides this. A tensor is lost also where the reference overflows.
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
        have, floor = distances.of_subject(name), _floor_eps(dtype, factor / CARRIED_FACTOR) * EPSILON[dtype]
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
    """Judge whether all values are exactly equal. 0.0 equals -0.0, infinity equals infinity, NaN equals NaN."""
    if (odd := _one_sided(subject, expected, "exact")) is not None:
        return odd
    judged = []
    for name, want in expected.items():
        have = subject[name]
        # The values are compared, not the norm of the difference, which may underflow.
        if have.shape == want.shape and _equal(have.detach(), want.detach()):
            judged.append(Judgement(True, 0.0, 0.0, name, "", "exact", 0))
            continue
        refused = _incomparable(name, have, want, "exact")
        judged.append(refused or Judgement(False, Distance.of(have, want).norm, 0.0, name, "", "exact", 0))
    return _with_worst_element(worst_of(judged, "exact"), subject, expected)


def _one_sided(subject: Mapping[str, Tensor], expected: Mapping[str, Tensor], policy: str) -> Judgement | None:
    """Return a failure that names the first missing or surplus tensor. Return None if both have the same names."""
    if not (odd := sorted(set(subject) ^ set(expected))):
        return None
    how = "missing, though expected" if odd[0] in expected else "present, though not expected"
    return Judgement(False, None, None, odd[0], how, policy, 0)


def _equal(have: Tensor, want: Tensor) -> bool:
    """Return whether all values are equal. Tensors with different or rare dtypes are compared in float64."""
    if have.dtype != want.dtype or have.dtype not in _COMPARABLE:
        have, want = have.double(), want.double()
    same = have == want
    return bool(same.all()) or bool((same | (have.isnan() & want.isnan())).all())


def rounded_once(
    subject: Mapping[str, Tensor], truth: Mapping[str, Tensor], terms: Mapping[str, Tensor] | None = None
) -> Judgement:
    """Judge tensors by the share of elements that differ from the correctly rounded float64 truth.

    The error is this share. It reveals a second or a wrong rounding, which hardly changes the Frobenius norm. In 16 bits,
    arithmetic in float32 may miss on which side of the middle between two numbers an element is. If it is that near the
    middle, both numbers are right. terms: the largest term of a sum, by the sum's name; the sum may be much smaller.
    """
    policy, judged = f"rounded once: share of wrongly rounded elements at most {DOUBLE_ROUNDED_SHARE:g} + 1 / n", []
    wrong = dict[str, Tensor]()
    for name, value in subject.items():
        near = MIDDLE_ULPS * EPSILON["float32"] if value.dtype in (torch.bfloat16, torch.float16) else 0.0
        largest = torch.maximum(truth[name].abs(), (terms or truth)[name].to(truth[name]).abs())
        ends = [(truth[name] + sign * near * largest).to(value.dtype) for sign in (-1, 1)]
        right = (value >= torch.minimum(*ends)) & (value <= torch.maximum(*ends))
        wrong[name] = ~right
        off = float(wrong[name].double().mean()) if value.numel() else 0.0
        allowed = DOUBLE_ROUNDED_SHARE + 1 / max(1, value.numel())
        judged.append(Judgement(off <= allowed, off, allowed, name, "", policy, 0))
    worst = worst_of(judged, policy)
    if (have := subject.get(worst.tensor)) is None:
        return worst
    # Elements that are right equal `rounded`, so the worst one is a wrongly rounded one.
    rounded = torch.where(wrong[worst.tensor], truth[worst.tensor].to(have.dtype), have)
    return _with_worst_element(worst, subject, {worst.tensor: rounded})


def unchanged(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Judgement:
    """Judge whether all values are exactly equal, as `exact` does, and whether the dtypes are equal."""
    for name in now.keys() & before.keys():
        if now[name].dtype != before[name].dtype:
            dtypes = f"{now[name].dtype}, should be {before[name].dtype}"
            return Judgement(False, None, None, name, dtypes, "exact", 0)
    return exact(now, before)


def worst_of(judged: list[Judgement], policy: str) -> Judgement:
    """Return the judgement with the largest ratio of error to allowed error. Any failure counts as worse than any pass.

    Its `nonfinite` is the total over all judgements. Undecided judgements are ignored unless all are undecided. If
    there is no judgement at all, return a failure.
    """
    if not judged:
        return Judgement(False, None, None, "", "nothing was observed", policy, 0)
    worst = max([j for j in judged if j.decided] or judged, key=lambda j: (not j.passed, j.ratio))
    return replace(worst, nonfinite=sum(j.nonfinite for j in judged))


def rows_within(value: Tensor, truth: Tensor, draws: Iterable[Tensor], dtype: str) -> Tensor:
    """Return a mask (T,) that is True for the rows of `value` (T, E) that agree with `truth`.

    draws: plausible results in `dtype`. Their errors decide how far a row may be off.
    """

    def off(some: Tensor) -> Tensor:
        difference: Tensor = torch.linalg.vector_norm(some.detach().double() - truth.double(), dim=-1)
        return difference

    length = torch.linalg.vector_norm(truth.double(), dim=-1)
    own = torch.stack([off(draw) for draw in draws]).amax()  # one row alone may have no error by chance
    floor = LARGEST_EPS * NOISE_FLOOR_EPS[dtype]
    within: Tensor = off(value) <= NOISE_FACTOR * own + floor * EPSILON[dtype] * length
    return within


def _undecidable(lost: Sequence[str], dtype: str, policy: str) -> Judgement:
    why = f"the reference itself is too inaccurate for {', '.join(lost[:3])} in {dtype}"
    return Judgement(False, None, None, "", why, policy, 0, decided=False)


def _floor_eps(dtype: str, times: float) -> float:
    """Return the floor of an allowed error, in eps. times: ratio of the error's factor to the usual factor."""
    return NOISE_FLOOR_EPS[dtype] * (max(1.0, times) if dtype in ROUNDED_SUMS else 1.0)


def _factor(factor: float, tensor: Tensor) -> float:
    """Return the allowed ratio of the error of `tensor` to the reference's own error.

    This is `factor`, or more for a tensor with few elements.
    """
    return factor * (1 + FEW_NUMBERS / max(1, tensor.numel()))


def _largest(errors: Sequence[Distance]) -> Distance:
    """Return the largest of each measure. A later draw that overflows is no measure of the error."""
    kept = [errors[0], *(one for one in errors[1:] if math.isfinite(one.norm) and math.isfinite(one.largest))]
    return Distance(*(max(getattr(e, m) for e in kept) for m in ("norm", "largest", "share")))


def _incomparable(name: str, value: Tensor, truth: Tensor, policy: str, undecided: bool = False) -> Judgement | None:
    """Return a failure for a tensor with a wrong shape or with elements that are not finite. Otherwise return None.

    undecided: True if the reference itself is too inaccurate in this dtype. Then elements that are not finite are
    allowed, because the reference may have overflowed.
    """
    if value.shape != truth.shape:
        shapes = f"shape {tuple(value.shape)}, should be {tuple(truth.shape)}"
        return Judgement(False, None, None, name, shapes, policy, 0)
    # The sum is finite only if every element is, and takes less time than a mask of the elements.
    nonfinite = 0 if math.isfinite(float(value.detach().sum())) else int((~torch.isfinite(value)).sum())
    if nonfinite and not undecided:
        return Judgement(False, None, None, name, describe_worst_element(value, truth), policy, nonfinite)
    return None


def _with_worst_element(judgement: Judgement, subject: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Judgement:
    """Return the judgement with a description of the worst element of its tensor, if the tensor has an error.

    Only this tensor is described, to save time.
    """
    if judgement.worst or judgement.tensor not in truth or (judgement.passed and not judgement.error):
        return judgement
    return replace(judgement, worst=describe_worst_element(subject[judgement.tensor], truth[judgement.tensor]))
