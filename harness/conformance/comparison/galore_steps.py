"""Steps of GaLore's own optimizer, taken by an implementation and by the reference, for the checks of this optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import DTYPES, Subject
from reference.galore import Projector, galore_step, projector

LR, DECAY = 0.1, 0.1
COMPARED = 12
"""Number of first steps to compare. Of a longer run, the last two are compared, too."""
MOVED = 8
"""Number of the step, counted from 0, before which the tensors' data become other tensors."""
LONG_GAP = 1000
"""An update_gap with which every step of a check is in the first subspace. After a second subspace, the weights depend on
the signs of its singular vectors, which are arbitrary."""
_SINGULAR_VALUES = 64
Signs = tuple[float, ...]
"""Sign (1 or -1) of each singular vector. The vectors of P come first, then those of Q."""


Bases = dict[tuple[Any, ...], Projector]
"""Cache: (tensor name, step number, `(dtype, seed)` or `float64`, `(dtype, seed, *signs of earlier steps)`) -> singular
vectors. For an exact SVD, which does not start from the old subspace, the last item of the key is ()."""


@dataclass(frozen=True)
class Step:
    """One step of an optimizer."""

    gradients: dict[str, Tensor]
    """Float64 gradient of each tensor, by name; empty for a step in which no tensor has a gradient."""
    lr: float = LR
    decay: float = DECAY


def numbers_of_bits(fresh: Subject) -> list[int | None]:
    """Return the values of the option `bits` to try with the Method's optimizer. None leaves the option out."""
    return [None, 8] if "bits" in inspect.signature(fresh.adapted.optimizer).parameters else [None]


def judge_optimizer(
    fresh: Subject,
    case: Case,
    tensors: dict[str, Tensor],
    steps: Sequence[Step],
    mine: dict[str, Tensor],
    bits: int | None,
) -> Judgement:
    """Judge the tensors `mine` after each step by the reference's tensors.

    tensors: name -> tensor before the first step. steps: the steps that `mine` has taken. bits: the option `bits` with
    which `mine` was computed, or None for an optimizer without this option.

    With 8 bits, eps may be added to sqrt(V), as the reference does, or to sqrt(V / (1 - beta2^t)), as the authors'
    8-bit optimizer and algorithm 2 of the paper do.
    """
    judgements = []
    for as_printed in (False,) if bits is None else (False, True):
        truth, rounded = (
            steps_of_reference(fresh, tensors, steps, dtype, {}, {}, bits or 32, as_printed)
            for dtype in ("float64", fresh.dtype)
        )
        judgements.append(noise_floor(mine, truth, rounded, fresh.dtype, case.factor("optimizer")))
        if judgements[-1].passed:
            break
    return min(judgements, key=lambda judgement: (not judgement.passed, judgement.ratio))


def _is_compared(number: int, steps: Sequence[Step]) -> bool:
    return number < COMPARED or number >= len(steps) - 2


def gradient_of(weight: Tensor, seed: int, decay: float) -> Tensor:
    """Return a random float64 gradient for `weight`.

    In a matrix, each singular value is `decay` times the previous one, up to `_SINGULAR_VALUES` of them; the rest are 0.
    The checks use subspaces of the largest ones. No two of these are equal, so the subspaces are unique.
    """
    return _drawn(tuple(weight.shape), seed, decay).to(weight.device, copy=True)


@lru_cache(maxsize=64)  # the histories of a case begin with the same gradients
def _drawn(shape: tuple[int, ...], seed: int, decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) != 2:
        return normal_noise(shape, generator)
    number = min(*shape, _SINGULAR_VALUES)
    # The factors Q of two random matrices are singular vectors; an SVD would cost ten times as much.
    U, V = (torch.linalg.qr(normal_noise((n, number), generator)).Q for n in shape)
    graded: Tensor = (U * decay ** torch.arange(number)) @ V.T
    return graded


def steps_of_subject(
    fresh: Subject,
    tensors: dict[str, Tensor],
    steps: Sequence[Step],
    resumed: int | None = None,
    by_closure: int | None = None,
    bits: int | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Take steps with the Method's optimizer. Return the tensors after each step, and messages about changed gradients.

    Before each step, the tensors get their initial values again. A message names a gradient that a step has changed.
    resumed: the step at which a new optimizer takes over and loads the state of the first one. by_closure: the step
    whose gradients a closure sets. bits: value of the optimizer's option `bits`, or None to leave the option out.
    """
    optimizer = new_optimizer(fresh, bits)
    start = {name: t.detach().clone() for name, t in tensors.items()}
    seen: dict[str, Tensor] = {}
    changed: list[str] = []
    for number, step in enumerate(steps):
        if number == resumed:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = new_optimizer(fresh, bits)
            optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = step.lr, step.decay
        given = {name: gradient.to(tensors[name].dtype) for name, gradient in step.gradients.items()}
        for name, tensor in tensors.items():
            tensor.data = tensor.data.clone() if number == MOVED else tensor.data
            tensor.data.copy_(start[name])
            tensor.grad = None

        def backward(given: dict[str, Tensor] = given, number: int = number) -> float:
            for name, gradient in given.items():
                transposed = number % 3 == 1
                tensors[name].grad = (
                    gradient.T.contiguous().T if transposed and gradient.dim() == 2 else gradient.clone()
                )
            return 1.0

        if number == by_closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()
        if _is_compared(number, steps):
            seen |= {f"step {number + 1} {name}": t.detach().clone() for name, t in tensors.items()}
        for name, gradient in given.items():
            after = tensors[name].grad
            if after is not None and not torch.equal(after, gradient):
                changed.append(f"step {number + 1} changes the gradient of {name}")
    for name, tensor in tensors.items():
        tensor.data.copy_(start[name])
        tensor.grad = None
    return seen, changed


def new_optimizer(fresh: Subject, bits: int | None = None) -> torch.optim.Optimizer:
    """Return a new optimizer of the Method. bits: value of its option `bits`, or None to leave the option out."""
    make: Callable[..., torch.optim.Optimizer | None] = fresh.adapted.optimizer
    optimizer = make(LR, DECAY) if bits is None else make(LR, DECAY, bits=bits)
    assert optimizer is not None  # noqa: S101  # the checks begin with this question
    return optimizer


def steps_of_reference(
    fresh: Subject,
    tensors: dict[str, Tensor],
    steps: Sequence[Step],
    dtype: str,
    signs: dict[int, Signs],
    bases: Bases,
    bits: int = 32,
    as_printed: bool = False,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Return the tensors after each step of the reference, with the same names as in `steps_of_subject`.

    signs: number of a step with a new subspace -> signs of its singular vectors. For a step that is missing in `signs`,
    the signs of the float64 SVD are used. bases: cache of singular vectors for calls with the same steps. bits: bits of
    the optimizer's moments, 8 or 32. as_printed: add eps to sqrt(V / (1 - beta2^t)), as algorithm 2 of the paper prints
    it. seed: if set, every gradient is moved at random by up to half a unit in the last place of `dtype`.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    config, seen = fresh.config, {}
    adam: dict[str, Any] = {"beta1": config.beta1, "beta2": config.beta2, "bits": bits}
    for name, tensor in tensors.items():
        low: dict[str, Any] = {"rank": 0}
        if name == "weight":
            low = {name: getattr(config, name) for name in ("rank", "update_gap", "scale", "side", "niter")}
        state: dict[str, Any] = {}
        for number, step in enumerate(steps):
            W = tensor.detach().to(DTYPES[dtype]).clone()
            if _is_compared(number, steps):
                seen[f"step {number + 1} {name}"] = W
            if name not in step.gradients:
                continue
            given = step.gradients[name].to(DTYPES[fresh.dtype])
            G = (given if seed is None else perturbed(given, dtype, generator)).to(DTYPES[dtype])
            basis = None
            if low["rank"] and state.get("step", 0) % config.update_gap == 0:
                how = config.rank, config.side, config.niter, Projector(state.get("P"), state.get("Q"))
                # Only a randomised SVD starts from the old subspace, whose signs earlier steps have chosen.
                before = (dtype, seed, *(some for step, some in signs.items() if step < number)) if config.niter else ()
                own, exact = (name, number, (dtype, seed), before), (name, number, "float64", before)
                for key, g in ((own, G), (exact, given.double())):
                    if key not in bases:
                        bases[key] = projector(g, *how)
                basis = _turned(bases[own], bases[exact], signs.get(number, ()))
            corrected = (1 - config.beta2 ** (state.get("step", 0) + 1)) ** 0.5 if as_printed else 1.0
            how_to = {**low, **adam, "eps": config.eps * corrected}
            galore_step(W, G, state, lr=step.lr, weight_decay=step.decay, given=basis, **how_to)
    return seen


def _turned(basis: Projector, exactly: Projector, signs: Signs) -> Projector:
    """Return `basis` with the signs of its columns changed, so that each column points the same way as in `exactly`.

    If `signs` are given, multiply each column by its item of `signs` afterwards.
    """
    columns = 0 if basis.P is None else basis.P.shape[1]
    return Projector(_with_signs(basis.P, exactly.P, signs[:columns]), _with_signs(basis.Q, exactly.Q, signs[columns:]))


def _with_signs(mine: Tensor | None, want: Tensor | None, signs: Signs) -> Tensor | None:
    if mine is None or want is None:
        return None
    turned = mine * (mine.double() * want).sum(0).sign().to(mine.dtype)
    return turned * torch.tensor(signs, dtype=mine.dtype, device=mine.device) if signs else turned
