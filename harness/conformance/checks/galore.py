"""Checks of GaLore's optimizer: across a refresh of the subspace, and with the calls that a training program makes.

The subspace is given by singular vectors P and Q of a gradient. A refresh, every `update_gap` steps, computes it anew.
M and V are the moments of Adam in the subspace.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.kept_memory import describe_views
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.subject import DTYPES, Subject
from harness.records.record import CheckResult
from reference.galore import Projector, galore_step, projector

_HISTORIES = ((5, 2, 2, False, 0), (3, 1, 2, True, 0), (7, 3, 1, False, 4))
"""Runs of `check_refresh`. Each is a tuple: (number of steps with gradients, update gap, rank, whether the weights are
square, index at which a step without gradients is inserted). Each run refreshes the subspace twice after the first
step."""
_LR, _DECAY = 0.1, 0.1
_STEPS, _WITHOUT_GRADIENT, _CHANGED, _RESUMED, _BY_CLOSURE = 12, 3, 5, 7, 9
"""`_STEPS`: number of steps of `check_optimizer`. The other constants are step numbers, counted from 0.
`_WITHOUT_GRADIENT`: the step without gradients. `_CHANGED`: the first step with another learning rate and weight decay.
`_RESUMED`: the first step of a new optimizer, which has loaded the state of the old one. `_BY_CLOSURE`: the step whose
gradients a closure computes."""
_ONE_GRADIENT, _ZEROS, _MOVED, _STANDING, _WITHOUT_DECAY = 4, 6, 8, 10, 11
"""Further step numbers of `check_optimizer`. `_ONE_GRADIENT`: only the first tensor has a gradient. `_ZEROS`: all
gradients are zero. `_MOVED`: the tensors' data are other tensors from now on. `_STANDING`: the
learning rate is 0. `_WITHOUT_DECAY`: the weight decay is 0."""
_MANY_STEPS, _SMALL = 270, 5_000
"""`_MANY_STEPS`: number of steps of `check_optimizer` if no tensor has more than `_SMALL` elements. Only the first
`_STEPS` and the last two steps are compared."""
_SINGULAR_VALUES = 64
Signs = tuple[float, ...]
"""Sign (1 or -1) of each singular vector. The vectors of P come first, then those of Q."""


_Bases = dict[tuple[Any, ...], Projector]
"""Cache: (tensor name, step number, dtype, dtype and signs of the earlier steps) -> singular vectors of the gradient.

Only a randomised SVD starts from the old subspace. For an exact SVD, the last item of the key is therefore empty."""


@dataclass(frozen=True)
class Step:
    """One step of an optimizer."""

    gradients: dict[str, Tensor]
    """Float64 gradient of each tensor, by name; empty for a step in which no tensor has a gradient."""
    lr: float = _LR
    decay: float = _DECAY


@check(depends_on_sizes=False)
def check_refresh(subject: Subject, case: Case) -> CheckResult:
    """GaLore's own optimizer moves the weights as the reference does, also across a refresh of the subspace.

    A refresh keeps the M and V of the old subspace, and weight decay is not projected  (GaLore, algorithm 2). The check
    makes three runs on random gradients: five steps with a new subspace at the third and the fifth, seven steps with a
    new subspace at the fourth and the seventh, and three steps with a new subspace at each. Before each step the
    weights are restored, so that no step inherits the rounding of another. Each run has one more step without a
    gradient: at the beginning, or after four of the seven steps. This step leaves the weights as they are, and is not
    counted when the next refresh is due. In one run the weights are stored transposed.

    The sign of a singular vector is arbitrary. It influences the weights after a refresh, since M is kept, and the
    check accepts every choice of signs. The tensors of the optimizer's state must not be views of much larger ones, such
    as of all singular vectors, because GaLore exists to save this memory.
    """
    found = []
    for steps, gap, rank, square, idle in _HISTORIES:
        fresh = case.attach_again(rank=rank, update_gap=gap, square=square)
        if fresh is None:
            return skipped(subject, case, "refresh", "the case cannot attach again")
        if fresh.adapted.optimizer(_LR, _DECAY) is None:
            return skipped(subject, case, "refresh", "the Method has no optimizer")
        for weight in (t for t in fresh.adapted.tensors().values() if square and t.dim() == 2):
            weight.data = weight.data.T.contiguous().T
        found += list(_of_layers(fresh, case, steps, idle))
    worst = worst_of(found, found[0].policy)
    if worst.passed and fresh is not None and (problem := _excess_of_state(fresh)):
        return from_problems(subject, case, "refresh", [problem])
    return judged(subject, case, "refresh", worst)


def _excess_of_state(fresh: Subject) -> str:
    """Take a step with the Method's optimizer, and return the message of `describe_views` about its state."""
    optimizer = new_optimizer(fresh)
    for path in fresh.adapted.layers:
        for seed, tensor in enumerate(fresh.tensors_of(path).values()):
            tensor.grad = _gradient(tensor, seed, 0.5).to(tensor.dtype)
    optimizer.step()
    return describe_views(list(optimizer.state.values()))


@check(depends_on_sizes=False)
def check_optimizer(subject: Subject, case: Case) -> CheckResult:
    """GaLore's own optimizer does what a training program expects of an optimizer of torch.

    The check takes twelve steps in one subspace, or 270 if the layers are small:

    - It changes the learning rate and the weight decay in `param_groups`, also to 0.
    - One step has no gradient, one has gradients of zeros, and one has a gradient for the first tensor only. A gradient of
      zeros counts: the moments decay, and the weights move.
    - Before one step, `data` of each parameter is replaced, as `model.to()` does. The state stays with the parameter.
    - Every third gradient is transposed in memory.
    - In one step a closure computes the gradients.
    - Between two steps, a new optimizer loads the state_dict of the old one.

    No step changes the gradients. If a parameter is added to a new group, it leaves its old group, or `add_param_group`
    raises ValueError, as in torch. An optimizer with the option `bits` also takes the twelve steps with bits=8. The
    results must stay the same, because the moments have fewer than 4096 elements and stay in 32 bits.
    """
    fresh = case.attach_again(rank=2, update_gap=1000)
    if fresh is None:
        return skipped(subject, case, "optimizer", "the case cannot attach again")
    if fresh.adapted.optimizer(_LR, _DECAY) is None:
        return skipped(subject, case, "optimizer", "the Method has no optimizer")
    if (groups := _groups_after_a_move(fresh)) != 1:
        return from_problems(
            subject, case, "optimizer", [f"a parameter that moved to a new group is in {groups} groups"]
        )
    every: list[Judgement] = []
    for bits in numbers_of_bits(fresh):  # the default comes first, so that a defect with 8 bits hides none without
        found, problems = list[Judgement](), list[str]()
        for index, path in enumerate(fresh.adapted.layers):
            tensors = fresh.tensors_of(path)
            small = all(t.numel() <= _SMALL for t in tensors.values())
            number = _MANY_STEPS if small and bits is None else _STEPS
            steps = [_step(step, tensors, case, index) for step in range(number)]
            mine, changed = steps_of_subject(fresh, tensors, steps, _RESUMED, _BY_CLOSURE, bits)
            where = path if bits is None else f"{path} with bits={bits}"
            problems += [f"{where}: {one}" for one in changed]
            verdict = judge_optimizer(fresh, case, tensors, steps, mine, bits)
            found.append(prefix_tensor(where, verdict))
        every += found
        worst = worst_of(found, found[0].policy)
        if not worst.passed:
            return judged(subject, case, "optimizer", worst)
        if problems:
            return from_problems(subject, case, "optimizer", problems)
    return judged(subject, case, "optimizer", worst_of(every, every[0].policy))


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

    With 8 bits, eps may be added to sqrt(V), as the reference does, or to sqrt(V / (1 - beta2^t)), as the authors'
    8-bit optimizer and algorithm 2 of the paper do.
    """
    judgements = []
    for as_printed in (False,) if bits is None else (False, True):
        truth, rounded = (
            _steps_of_reference(fresh, tensors, steps, dtype, {}, {}, bits or 32, as_printed)
            for dtype in ("float64", fresh.dtype)
        )
        judgements.append(noise_floor(mine, truth, rounded, fresh.dtype, case.factor("optimizer")))
        if judgements[-1].passed:
            break
    return min(judgements, key=lambda judgement: (not judgement.passed, judgement.ratio))


def _groups_after_a_move(fresh: Subject) -> int:
    """Add a parameter of the optimizer to a new parameter group. Return the number of groups that then contain it."""
    optimizer = new_optimizer(fresh)
    moved = optimizer.param_groups[0]["params"][0]
    with contextlib.suppress(ValueError):  # then the old group keeps it
        optimizer.add_param_group({"params": [moved], "lr": 0.0})
    return sum(any(p is moved for p in group["params"]) for group in optimizer.param_groups)


def _step(number: int, tensors: dict[str, Tensor], case: Case, layer: int) -> Step:
    """Return step `number` of `check_optimizer` for the tensors of a layer."""
    with_gradient = {_WITHOUT_GRADIENT: [], _ONE_GRADIENT: list(tensors)[:1]}.get(number, list(tensors))
    gradients = {
        n: _gradient(tensors[n], case.generator(salt=1000 * layer + number).initial_seed(), 0.5) * (number != _ZEROS)
        for n in with_gradient
    }
    share = 0.5 if number >= _CHANGED else 1.0
    return Step(gradients, _LR * share * (number != _STANDING), _DECAY * share * (number != _WITHOUT_DECAY))


def _is_compared(number: int, steps: Sequence[Step]) -> bool:
    return number < _STEPS or number >= len(steps) - 2


def _of_layers(fresh: Subject, case: Case, steps: int, idle: int) -> Iterator[Judgement]:
    """Take `steps` steps with each layer, and yield a judgement of each layer.

    After the first `idle` steps, one more step has no gradients.
    """
    # Singular values that fall slowly distinguish a randomised SVD from the exact one.
    decay = 0.9 if fresh.config.niter else 0.5
    for index, path in enumerate(fresh.adapted.layers):
        tensors = fresh.tensors_of(path)
        gradients = [
            Step({name: _gradient(t, seed, decay) for name, t in tensors.items()})
            for seed in (case.generator(salt=50 * index + step).initial_seed() for step in range(steps))
        ]
        gradients.insert(idle, Step({}))
        mine, _ = steps_of_subject(fresh, tensors, gradients)
        best = min(_judgements(fresh, case, tensors, gradients, mine), key=lambda j: (not j.passed, j.ratio))
        yield prefix_tensor(f"{path}, update_gap {fresh.config.update_gap}", best)


def _gradient(weight: Tensor, seed: int, decay: float) -> Tensor:
    """Return a random float64 gradient for `weight`.

    In a matrix, each singular value is `decay` times the previous one, up to `_SINGULAR_VALUES` of them; the rest are 0.
    The checks use subspaces of the largest ones. No two of these are equal, so the subspaces are unique.
    """
    return _drawn(tuple(weight.shape), seed, decay).to(weight.device, copy=True)


@lru_cache(maxsize=64)  # the histories of a case begin with the same gradients
def _drawn(shape: tuple[int, ...], seed: int, decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) != 2:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    number = min(*shape, _SINGULAR_VALUES)
    # The factors Q of two random matrices are singular vectors; an SVD would cost ten times as much.
    U, V = (torch.linalg.qr(torch.randn(n, number, generator=generator, dtype=torch.float64)).Q for n in shape)
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
            tensor.data = tensor.data.clone() if number == _MOVED else tensor.data
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
    optimizer = make(_LR, _DECAY) if bits is None else make(_LR, _DECAY, bits=bits)
    assert optimizer is not None  # noqa: S101  # the checks begin with this question
    return optimizer


def _judgements(
    fresh: Subject, case: Case, tensors: dict[str, Tensor], steps: Sequence[Step], mine: dict[str, Tensor]
) -> Iterator[Judgement]:
    """Judge the tensors `mine` by the reference, and yield a judgement for each choice of signs.

    The signs apply to the reference's singular vectors at both refreshes. Stop after the first judgement that passes.
    """
    rank = min(fresh.config.rank, *next(t for t in tensors.values() if t.dim() == 2).shape)
    with_gradients = [number for number, step in enumerate(steps) if step.gradients]
    first, second = with_gradients[fresh.config.update_gap :: fresh.config.update_gap]
    columns = 2 * rank if fresh.config.side == "full" else rank
    bases: _Bases = {}
    for signs in itertools.product((1.0, -1.0), repeat=2 * columns):
        chosen = {first: signs[:columns], second: signs[columns:]}
        truth, rounded = (
            _steps_of_reference(fresh, tensors, steps, dtype, chosen, bases) for dtype in ("float64", fresh.dtype)
        )
        judgement = noise_floor(mine, truth, rounded, fresh.dtype, case.factor("refresh"))
        yield judgement
        if judgement.passed:
            return


def _steps_of_reference(
    fresh: Subject,
    tensors: dict[str, Tensor],
    steps: Sequence[Step],
    dtype: str,
    signs: dict[int, Signs],
    bases: _Bases,
    bits: int = 32,
    as_printed: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors after each step of the reference, with the same names as in `steps_of_subject`.

    signs: number of a step with a new subspace -> signs of its singular vectors. For a step that is missing in `signs`,
    the signs of the float64 SVD are used. bases: cache of singular vectors for calls with the same steps. as_printed:
    add eps to sqrt(V / (1 - beta2^t)), as algorithm 2 of the paper prints it.
    """
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
            G = step.gradients[name].to(DTYPES[fresh.dtype]).to(DTYPES[dtype])
            basis = None
            if low["rank"] and state.get("step", 0) % config.update_gap == 0:
                how = config.rank, config.side, config.niter, Projector(state.get("P"), state.get("Q"))
                # Only a randomised SVD starts from the old subspace, whose signs earlier steps have chosen.
                before = (dtype, *(some for step, some in signs.items() if step < number)) if config.niter else ()
                own, exact = ((name, number, one, before) for one in (dtype, "float64"))
                for key, g in ((own, G), (exact, G.double())):
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
