"""Checks of PiSSA's start: the residual and the principal part of the weight.

PiSSA splits a weight W into the principal part s B A, which trains, and the frozen residual W_res.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.layer_comparison import PlausibleResults
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import (
    ROUNDED_SUMS,
    Judgement,
    noise_floor,
    rounded_once,
    worst_of,
)
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import DTYPES, Subject
from harness.conformance.tolerance_constants import (
    EPSILON,
    NOISE_FLOOR_EPS,
    PERTURBED_DRAWS,
    RANDOM_SHARE,
    RANDOMISED_SIGMAS,
)
from harness.errors import Unsupported
from harness.methods.spec import Adapted
from harness.records.record import CheckResult
from reference.pissa import exact_svd, fast_svd

_STARTS = 4
"""Number of times that an implementation with a randomised SVD is attached."""
_REFERENCE_STARTS = 32
"""Number of the reference's randomised SVDs from which `check_principal` estimates the expected mean of ||s B A||^2."""
_TIMES = 8
"""Factor of `_STARTS` and `_REFERENCE_STARTS` in the second try, if the means differ in the first."""
_LARGE, _TAIL, _FALL = (1030, 1040), 60, 0.95
"""The large weight of `check_svd`: its sizes, the number of singular values beyond the rank, and the ratio of each to the
one before. A randomised SVD of a few iterations is visibly inexact for such values."""
_STEEP, _PER_DECADE, _NITER = (96, 80), 16, 8
"""A weight with a steep spectrum: its sizes, and the number of singular values after which they are a tenth, which is also
the rank. `_NITER`: number of subspace iterations of the randomised SVD."""
_LEFT = 2.0
"""Largest ratio of what an implementation leaves of the steep weight to what the reference leaves. The reference leaves
nearly the optimum with every seed; an SVD that collapses to the largest singular values leaves over ten times as much."""
_WIDER = 32
"""The rounding of W_res to 16 bits is judged if W_res has a unit in the last place at least so many times as large as that
of W in float32. Otherwise, the float32 errors of W - s B A hide it."""


@check()
def check_residual(subject: Subject, case: Case) -> CheckResult:
    """At PiSSA's start W_res + s B A is the original weight.

    The allowed error is a multiple of the reference's error in this dtype. W_res contains the rounding errors of A and
    B  (PiSSA, eqs. 2 to 5). In 16 bits, nearly every element of W_res must also be the correctly rounded value of W - s
    B A, computed from the rounded factors. A W_res that is so small that it shows the errors of float32 is exempt, such as
    one in float16 at full rank.
    """
    fresh = case.attach_again()
    if fresh is None or not all(f"{path}.residual" in fresh.state() for path in fresh.bases):
        return skipped(subject, case, "residual", "the implementation does not show its residual in state()")
    reference, found = fresh.fresh_reference(fresh.dtype), []
    rounded_wrongly = None
    for path in fresh.bases:
        truth = {"residual + s B A": fresh.original_weight(path).double()}
        mine, rounded = (
            {
                "residual + s B A": adapted.state()[f"{path}.residual"].detach().double()
                + _principal(fresh, adapted, path)["s B A"]
            }
            for adapted in (fresh.adapted, reference)
        )
        found.append(prefix_tensor(path, noise_floor(mine, truth, rounded, subject.dtype, case.factor("residual"))))
        rounding = _rounding_of_residual(fresh, path)
        if rounding is not None and not rounding.passed:
            rounded_wrongly = prefix_tensor(path, rounding)
    worst = worst_of(found, found[0].policy)
    return judged(subject, case, "residual", rounded_wrongly if rounded_wrongly and worst.passed else worst)


def _rounding_of_residual(fresh: Subject, path: str) -> Judgement | None:
    """Judge how W_res was rounded to 16 bits. Return None in other dtypes, and if W_res is too small, see `_WIDER`."""
    W, residual = fresh.original_weight(path).double(), fresh.state()[f"{path}.residual"].detach()
    if fresh.dtype in ROUNDED_SUMS:
        return None
    exactly = W - _principal(fresh, fresh.adapted, path)["s B A"]
    unit, of_float32 = EPSILON[fresh.dtype] * float(exactly.norm()), EPSILON["float32"] * float(W.norm())
    return (
        rounded_once({"residual": residual}, {"residual": exactly}, {"residual": W})
        if unit >= _WIDER * of_float32
        else None
    )


@check()
def check_principal(subject: Subject, case: Case) -> CheckResult:
    """At PiSSA's start, s B A equals U_r S_r V_r^T, the best rank-r approximation of the weight.

    Each factor holds the square root of every singular value: A A^T = B^T B = S_r / s  (PiSSA, eqs. 2 and 3). With a
    randomised SVD, s B A is less exact. Then the mean of ||s B A||^2 over some starts must equal the reference's mean,
    which grows with the number of iterations.
    """
    fresh = case.attach_again()
    if fresh is None:
        return skipped(subject, case, "principal", "the case cannot attach again")
    if fresh.config.niter:
        # A few starts may lie far from the mean by chance. If the means differ, more starts decide.
        differs = [*_of_randomised_starts(subject, case)] and [*_of_randomised_starts(subject, case, times=_TIMES)]
        return from_problems(subject, case, "principal", differs)
    reference, found = fresh.fresh_reference(fresh.dtype), []
    for path in fresh.bases:
        W = fresh.original_weight(path).double()
        mine, rounded = (_principal(fresh, adapted, path) for adapted in (fresh.adapted, reference))
        draws = PlausibleResults(chain([rounded], _perturbed(W, fresh)))
        truth = _best(*exact_svd(W, fresh.config.rank), fresh.config)
        found.append(prefix_tensor(path, noise_floor(mine, truth, draws, subject.dtype, case.factor("principal"))))
    return judged(subject, case, "principal", worst_of(found, found[0].policy))


@check(States.INIT, depends_on_sizes=False, only_wide=True, also_in_typical_case=True)
def check_svd(subject: Subject, case: Case) -> CheckResult:
    """PiSSA's start is right for large, zero and low-rank weights, and for singular values that fall quickly.

    Without `niter`, the SVD is exact whatever the size of the weight, so s B A is its best approximation of rank r. If
    the weight is zero, A, B and W_res are zero. If its rank is below r, s B A is the weight, and nothing is NaN. The
    singular values of trained weights span many orders of magnitude. A randomised SVD (`niter`) whose products are not
    made orthonormal in between then finds only the largest ones. A weight has as many singular values as its smaller
    side, so a larger rank must be refused.
    """
    if subject.config.niter or case.attach_fresh is None:
        return skipped(subject, case, "svd", "the SVD is randomised, or the case cannot attach again")
    W, best = _graded(case.generator(salt=80), subject.config.rank)
    rank = subject.config.rank
    low = normal_noise((4 * rank, 1), case.generator(salt=83)) @ normal_noise((1, 3 * rank), case.generator(salt=84))
    one_column = torch.cat([low[:, :1], torch.zeros_like(low[:, 1:])], dim=1)  # its other singular values are exactly 0
    weights = {"large": W, "zeros": torch.zeros_like(W[: 2 * rank]), "low": low, "column": one_column}
    model = nn.ModuleDict({name: _linear(weight, subject.own[0]) for name, weight in weights.items()})
    fresh = case.attach_again(model=model, targets=tuple(weights))
    assert fresh is not None  # noqa: S101  # it can attach again
    problems = [f"{name} of a weight of zeros is not 0" for name, t in _of_zeros(fresh).items() if bool((t != 0).any())]
    product = _principal(fresh, fresh.adapted, "large")["s B A"]
    error = float((product - best.to(product.device)).norm() / best.norm())
    if not error <= RANDOM_SHARE:
        problems.append(f"s B A differs by {error:.2g} of its size from the best approximation of a {_LARGE} weight")
    for name, weight in (("low", low), ("column", one_column)):
        rest = float((_principal(fresh, fresh.adapted, name)["s B A"].cpu() - weight).norm() / weight.norm())
        if not rest <= RANDOM_SHARE:
            problems.append(f"s B A of a weight of rank 1 ({name}) differs by {rest:.2g} of its size from the weight")
    problems += [*_of_a_steep_weight(subject, case), *_of_a_narrow_weight(subject, case)]
    return from_problems(subject, case, "svd", problems, f"a {_LARGE} weight, zeros, and two weights of rank 1")


def _of_a_steep_weight(subject: Subject, case: Case) -> Iterator[str]:
    """Yield a message if a randomised SVD leaves more of a weight with a steep spectrum than the reference's SVD leaves."""
    generator = case.generator(salt=81)
    U, V = (torch.linalg.qr(normal_noise((n, _STEEP[1]), generator)).Q for n in _STEEP)
    W = (U * 10 ** (-torch.arange(_STEEP[1]) / _PER_DECADE)) @ V.T
    model = nn.ModuleDict({"steep": _linear(W, subject.own[0])})
    try:
        fresh = case.attach_again(model=model, targets=("steep",), rank=_PER_DECADE, alpha=_PER_DECADE, niter=_NITER)
    except Unsupported:
        return
    assert fresh is not None  # noqa: S101  # it can attach again
    programs = fresh.adapted, fresh.fresh_reference(fresh.dtype)
    mine, own = (float((W - _principal(fresh, one, "steep")["s B A"].cpu()).norm()) for one in programs)
    if not mine <= _LEFT * own:
        yield f"with niter={_NITER}, W - s B A has the norm {mine:.2g} for a {_STEEP} weight, should be about {own:.2g}"


def _of_a_narrow_weight(subject: Subject, case: Case) -> Iterator[str]:
    """Yield a message if an adapter has a rank above the smaller side of its weight."""
    rank = subject.config.rank + 1
    W = torch.randn(rank - 1, 2 * rank, generator=case.generator(salt=82))
    model = nn.ModuleDict({"narrow": _linear(W, subject.own[0])})
    try:
        case.attach_again(model=model, targets=("narrow",), rank=rank)
    except (Unsupported, ValueError, TypeError, LookupError, RuntimeError, AssertionError):
        return
    yield f"rank {rank} is accepted for a weight with {rank - 1} singular values; attach must raise ValueError"


def _linear(W: Tensor, like: Tensor) -> nn.Linear:
    """Return a linear layer with the weight W, in the dtype of `like` and on its device."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device=like.device, dtype=like.dtype)
    layer.weight.data.copy_(W)
    return layer


def _of_zeros(fresh: Subject) -> dict[str, Tensor]:
    tensors = {**fresh.adapted.tensors(), **fresh.state()}
    return {name: t.detach() for name, t in tensors.items() if name.startswith("zeros.")}


def _graded(generator: torch.Generator, rank: int) -> tuple[Tensor, Tensor]:
    """Return a `_LARGE` weight in float64 whose singular values fall slowly, and its best approximation of this rank."""
    number = min(rank + _TAIL, *_LARGE)
    U, V = (torch.linalg.qr(normal_noise((n, number), generator)).Q for n in _LARGE)
    S = _FALL ** torch.arange(number)
    return (U * S) @ V.T, (U[:, :rank] * S[:rank]) @ V[:, :rank].T


def _of_randomised_starts(subject: Subject, case: Case, times: int = 1) -> Iterator[str]:
    """Yield a message for each layer in which the mean of ||s B A||^2 over some starts is not the reference's.

    The starts come from randomised SVDs. The mean may be off by a multiple of its standard error. times: factor by which
    to multiply the numbers of starts.
    """
    starts = [one for seed in range(times * _STARTS) if (one := case.attach_again(seed=seed)) is not None]
    for path in subject.bases:
        W, config = subject.original_weight(path).double(), subject.config
        most, count = exact_svd(W, config.rank)[1].square().sum(), times * _REFERENCE_STARTS
        drawn = (fast_svd(W, config.rank, config.niter, case.generator(salt=40 + n)) for n in range(count))
        expected = torch.stack([S.square().sum() / most for _, S, _ in drawn])
        products = [_principal(one, one.adapted, path)["s B A"] for one in starts]
        mine = torch.stack([product.square().sum() / most for product in products])
        error = float(expected.std()) * (1 / len(mine) + 1 / len(expected)) ** 0.5
        # Rounding a factor of n numbers changes its squared norm by at most 1 eps, and by less the larger n is.
        roundings = sum((config.rank * side) ** -0.5 for side in W.shape)
        bound = RANDOMISED_SIGMAS * error + (NOISE_FLOOR_EPS[subject.dtype] + roundings) * EPSILON[subject.dtype]
        if abs(float(mine.mean() - expected.mean())) > bound:
            yield (
                f"{path}: s B A has {float(mine.mean()):.4f} of the largest possible ||s B A||^2, "
                f"should be {float(expected.mean()):.4f} +- {bound:.2g}"
            )


def _best(U: Tensor, S: Tensor, Vt: Tensor, config: Any) -> dict[str, Tensor]:
    share = torch.diag(S * config.rank / config.alpha)
    return {"s B A": (U * S) @ Vt, "A A^T": share, "B^T B": share}


def _perturbed(W: Tensor, subject: Subject) -> Iterator[dict[str, Tensor]]:
    """Yield plausible results of `_principal`: results that a correct program may compute.

    They can differ much, because rounding rotates the singular vectors of close singular values. Each result comes from
    an SVD of W^T in the dtype in which PiSSA computes, after W was moved by up to half a unit in the last place.
    """
    dtype = torch.promote_types(DTYPES[subject.dtype], torch.float32)
    for seed in range(PERTURBED_DRAWS):
        near = perturbed(W, subject.dtype, torch.Generator().manual_seed(seed))
        V, S, Ut = (one.double() for one in exact_svd(near.T.to(dtype), subject.config.rank))
        yield _best(Ut.T, S, V.T, subject.config)


def _principal(subject: Subject, adapted: Adapted, path: str) -> dict[str, Tensor]:
    """Return `s B A`, `A A^T` and `B^T B` of a layer in float64. s is the scaling alpha / rank."""
    A, B = (adapted.tensors()[f"{path}.{letter}"].detach().double() for letter in "AB")
    return {"s B A": subject.config.alpha / subject.config.rank * (B @ A), "A A^T": A @ A.T, "B^T B": B.T @ B}
