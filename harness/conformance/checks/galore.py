"""Checks of GaLore's optimizer: across a refresh of the subspace, and with the calls that a training program makes.

The subspace is given by singular vectors P and Q of a gradient. A refresh, every `update_gap` steps, computes it anew.
M and V are the moments of Adam in the subspace.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.galore_steps import (
    COMPARED,
    DECAY,
    LONG_GAP,
    LR,
    Bases,
    Signs,
    Step,
    gradient_of,
    judge_optimizer,
    new_optimizer,
    numbers_of_bits,
    steps_of_reference,
    steps_of_subject,
)
from harness.conformance.comparison.kept_memory import describe_views
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.subject import Subject
from harness.conformance.tolerance_constants import PERTURBED_DRAWS
from harness.records.record import CheckResult

_HISTORIES = ((5, 2, 2, False, 0, None), (3, 1, 2, True, 0, None), (7, 3, 1, False, 4, 2))
"""Runs of `check_refresh`. Each is a tuple: (number of steps with gradients, update gap, rank, whether the weights are
square, index at which a step without gradients is inserted, step at which a new optimizer takes over or None). Each run
refreshes the subspace twice after the first step."""
_STEPS, _WITHOUT_GRADIENT, _CHANGED, _RESUMED, _BY_CLOSURE = COMPARED, 3, 5, 7, 9
"""`_STEPS`: number of steps of `check_optimizer`. The other constants are step numbers, counted from 0.
`_WITHOUT_GRADIENT`: the step without gradients. `_CHANGED`: the first step with another learning rate and weight decay.
`_RESUMED`: the first step of a new optimizer, which has loaded the state of the old one. `_BY_CLOSURE`: the step whose
gradients a closure computes."""
_ONE_GRADIENT, _ZEROS, _STANDING, _WITHOUT_DECAY = 4, 6, 10, 11
"""Further step numbers of `check_optimizer`. `_ONE_GRADIENT`: only the first tensor has a gradient. `_ZEROS`: all
gradients are zero. `_STANDING`: the learning rate is 0. `_WITHOUT_DECAY`: the weight decay is 0."""
_MANY_STEPS, _SMALL = 270, 5_000
"""`_MANY_STEPS`: number of steps of `check_optimizer` if no tensor has more than `_SMALL` elements. Only the first
`_STEPS` and the last two steps are compared."""


@check(depends_on_sizes=False)
def check_refresh(subject: Subject, case: Case) -> CheckResult:
    """GaLore's own optimizer moves the weights as the reference does, also across a refresh of the subspace.

    A refresh keeps the M and V of the old subspace, and weight decay is not projected  (GaLore, algorithm 2). The check
    makes three runs on random gradients: five steps with a new subspace at the third and the fifth, seven steps with a
    new subspace at the fourth and the seventh, and three steps with a new subspace at each. Before each step the
    weights are restored, so that no step inherits the rounding of another. Each run has one more step without a
    gradient: at the beginning, or after four of the seven steps. This step leaves the weights as they are, and is not
    counted when the next refresh is due. In one run the weights are stored transposed. In the run of seven steps, a new
    optimizer loads the state_dict of the first one after two steps.

    The sign of a singular vector is arbitrary. It influences the weights after a refresh, since M is kept, and the
    check accepts every choice of signs. The tensors of the optimizer's state must not be views of much larger ones, such
    as of all singular vectors, because GaLore exists to save this memory.
    """
    found = []
    for steps, gap, rank, square, idle, resumed in _HISTORIES:
        fresh = case.attach_again(rank=rank, update_gap=gap, square=square)
        if fresh is None:
            return skipped(subject, case, "refresh", "the case cannot attach again")
        if fresh.adapted.optimizer(LR, DECAY) is None:
            return skipped(subject, case, "refresh", "the Method has no optimizer")
        for weight in (t for t in fresh.adapted.tensors().values() if square and t.dim() == 2):
            weight.data = weight.data.T.contiguous().T
        found += list(_of_layers(fresh, case, steps, idle, resumed))
    worst = worst_of(found, found[0].policy)
    if worst.passed and fresh is not None and (problem := _excess_of_state(fresh)):
        return from_problems(subject, case, "refresh", [problem])
    return judged(subject, case, "refresh", worst)


def _excess_of_state(fresh: Subject) -> str:
    """Take a step with the Method's optimizer, and return the message of `describe_views` about its state."""
    optimizer = new_optimizer(fresh)
    for path in fresh.adapted.layers:
        for seed, tensor in enumerate(fresh.tensors_of(path).values()):
            tensor.grad = gradient_of(tensor, seed, 0.5).to(tensor.dtype)
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
    fresh = case.attach_again(rank=2, update_gap=LONG_GAP)
    if fresh is None:
        return skipped(subject, case, "optimizer", "the case cannot attach again")
    if fresh.adapted.optimizer(LR, DECAY) is None:
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
        n: gradient_of(tensors[n], case.generator(salt=1000 * layer + number).initial_seed(), 0.5) * (number != _ZEROS)
        for n in with_gradient
    }
    share = 0.5 if number >= _CHANGED else 1.0
    return Step(gradients, LR * share * (number != _STANDING), DECAY * share * (number != _WITHOUT_DECAY))


def _of_layers(fresh: Subject, case: Case, steps: int, idle: int, resumed: int | None) -> Iterator[Judgement]:
    """Take `steps` steps with each layer, and yield a judgement of each layer.

    After the first `idle` steps, one more step has no gradients. resumed: the step at which a new optimizer takes over.
    """
    # Singular values that fall slowly distinguish a randomised SVD from the exact one.
    decay = 0.9 if fresh.config.niter else 0.5
    for index, path in enumerate(fresh.adapted.layers):
        tensors = fresh.tensors_of(path)
        gradients = [
            Step({name: gradient_of(t, seed, decay) for name, t in tensors.items()})
            for seed in (case.generator(salt=50 * index + step).initial_seed() for step in range(steps))
        ]
        gradients.insert(idle, Step({}))
        mine, _ = steps_of_subject(fresh, tensors, gradients, resumed)
        verdict = _judge_refresh(fresh, case, tensors, gradients, mine)
        yield prefix_tensor(f"{path}, update_gap {fresh.config.update_gap}", verdict)


def _judge_refresh(
    fresh: Subject, case: Case, tensors: dict[str, Tensor], steps: Sequence[Step], mine: dict[str, Tensor]
) -> Judgement:
    """Judge the tensors `mine` by the reference, for each choice of signs. Return the best judgement.

    The signs apply to the reference's singular vectors at both refreshes. A single run of the reference may happen to
    have almost no error. If no choice passes, the best one is judged again by further runs, whose gradients are moved
    within rounding errors.
    """
    rank = min(fresh.config.rank, *next(t for t in tensors.values() if t.dim() == 2).shape)
    with_gradients = [number for number, step in enumerate(steps) if step.gradients]
    first, second = with_gradients[fresh.config.update_gap :: fresh.config.update_gap]
    columns = 2 * rank if fresh.config.side == "full" else rank
    bases: Bases = {}
    factor = case.factor("refresh")

    def judge(chosen: dict[int, Signs], seeds: Sequence[int | None]) -> Judgement:
        truth = steps_of_reference(fresh, tensors, steps, "float64", chosen, bases)
        draws = (steps_of_reference(fresh, tensors, steps, fresh.dtype, chosen, bases, seed=seed) for seed in seeds)
        return noise_floor(mine, truth, draws, fresh.dtype, factor)

    tried: list[tuple[Judgement, dict[int, Signs]]] = []
    for signs in itertools.product((1.0, -1.0), repeat=2 * columns):
        chosen = {first: signs[:columns], second: signs[columns:]}
        tried.append((judge(chosen, [None]), chosen))
        if tried[-1][0].passed:
            return tried[-1][0]
    _, chosen = min(tried, key=lambda one: one[0].ratio)
    return judge(chosen, [None, *range(PERTURBED_DRAWS)])
