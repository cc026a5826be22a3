"""Checks that a Method's own optimizer behaves as every optimizer of torch does. They do not call the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor

from harness.conformance import process_settings
from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.galore_steps import LONG_GAP, new_optimizer, numbers_of_bits
from harness.conformance.comparison.tolerance_policies import unchanged, worst_of
from harness.conformance.subject import Subject
from harness.records.record import CheckResult

_LR, _DECAY = 0.1, 0.1
_STEPS_BEFORE = 2
"""Number of steps before the state is saved."""


@check(depends_on_sizes=False)
def check_closure(subject: Subject, case: Case) -> CheckResult:
    """The Method's own optimizer calls a closure once, in gradient mode, so that the closure can call `loss.backward()`.

    `step` returns what the closure returned, and runs the hooks that were registered on the optimizer, each once. If a
    closure raises, gradients are switched on as before. A parameter that `add_param_group` adds later trains, too. Each
    group has its own learning rate and weight decay. If an optimizer refuses a gradient that is not finite, the step
    changes nothing, so that the next step is that of an optimizer which has not seen this gradient.
    """
    fresh = case.attach_again()
    if fresh is None or fresh.adapted.optimizer(_LR, _DECAY) is None:
        return skipped(subject, case, "closure", "the Method has no optimizer, or the case cannot attach again")
    modes = []

    def closure() -> float:
        modes.append(torch.is_grad_enabled())
        return 1.0

    optimizer = new_optimizer(fresh)
    hooks: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("before"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("after"))
    returned = optimizer.step(closure)
    odd = [] if hooks == ["before", "after"] else ["step does not run each hook of the optimizer once"]
    odd += [] if returned == 1.0 else [f"step returns {returned!r}, and the closure returned 1.0"]
    odd += [] if len(modes) == 1 else [f"step calls the closure {len(modes)} times"]
    odd += [] if all(modes) else ["step calls the closure without gradients"]
    with suppress(_StoppedError):
        optimizer.step(_stop)
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        odd.append("after a closure that raises, gradients are switched off")
    for shape in ((4,), fresh.own[0].shape):
        odd += _of_added_groups(optimizer, torch.ones(shape, device=fresh.own[0].device))
    if (often := case.attach_again(update_gap=1)) is not None:  # GaLore refuses such a gradient in any step then
        odd += chain.from_iterable(_after_a_refused_step(often, case, number) for number in (1, 2))
    return from_problems(subject, case, "closure", odd)


def _of_added_groups(optimizer: torch.optim.Optimizer, values: Tensor) -> Iterator[str]:
    """Add three groups with one parameter each, and take a step after each. Yield a message for each wrong step.

    The first group has the usual settings, so its parameter must move. The second has a learning rate of 0. The third has
    a weight decay of 0 and a gradient of zeros. The parameters of these two must not move. A group that the optimizer
    refuses is left out. values: the values of each parameter.
    """
    for options, gradient, moves, problem in (
        ({}, values, True, "a parameter added by add_param_group does not train"),
        ({"lr": 0.0}, values, False, "a group with a learning rate of 0 gets the learning rate of another group"),
        ({"weight_decay": 0.0}, 0 * values, False, "a group with a weight decay of 0 gets the decay of another group"),
    ):
        added = torch.nn.Parameter(values.clone())
        added.grad = gradient.clone()
        with suppress(ValueError, NotImplementedError):  # an optimizer may refuse such a group
            optimizer.add_param_group({"params": [added], **options})
        if any(one is added for group in optimizer.param_groups for one in group["params"]):
            optimizer.step()
            if bool((added == values).all()) is moves:
                yield problem


def _after_a_refused_step(fresh: Subject, case: Case, number: int) -> Iterator[str]:
    """Take a step that the optimizer refuses, and then one with good gradients. Yield a message if either is wrong.

    The gradient of the first tensor holds an infinity in the refused step. Yield nothing if the optimizer accepts it.
    number: that of the refused step. The steps before it have good gradients.
    """
    tensors = fresh.adapted.tensors()
    start = {name: t.detach().clone() for name, t in tensors.items()}
    generator = case.generator()
    gradients = {name: torch.randn(t.shape, generator=generator) for name, t in start.items()}
    first = next(iter(tensors))
    ends = []
    with torch.random.fork_rng():
        for refused in (True, False):
            optimizer = new_optimizer(fresh)
            _put(tensors, start)
            process_settings.seed(0)  # for an optimizer that draws random numbers
            for _ in range(number - 1):
                _step(optimizer, tensors, gradients)
            if refused:
                before = tensors[first].detach().clone()
                for tensor in tensors.values():
                    tensor.grad = None  # otherwise other tensors may take this step before the first is refused
                try:
                    _step(optimizer, {first: tensors[first]}, {first: gradients[first] * torch.inf})
                except (ValueError, RuntimeError, ArithmeticError, AssertionError):  # torch's SVD raises a RuntimeError
                    if not unchanged({first: tensors[first].detach()}, {first: before}).passed:
                        yield f"a step that raises changes {first}"
                else:
                    break
            _put(tensors, start)
            process_settings.seed(0)
            _step(optimizer, tensors, gradients)
            ends.append({name: t.detach().clone() for name, t in tensors.items()})
    _put(tensors, start)
    if len(ends) > 1 and not (verdict := unchanged(*ends)).passed:
        yield f"after step {number} raised, the next step moves {verdict.tensor} as if step {number} had counted"


class _StoppedError(Exception):
    """Raised by a closure."""


def _stop() -> float:
    raise _StoppedError


@check(depends_on_sizes=False)
def check_resume(subject: Subject, case: Case) -> CheckResult:
    """An optimizer that loads another one's state_dict has the same state and dtypes, and takes the same next step.

    This holds with moments in 32 bits and, if the optimizer has the option `bits`, in 8 bits. A scheduler of torch may set
    the learning rate, and a program may add keys of its own to `param_groups`. An optimizer that loads the state of a new
    one begins anew, like the first optimizer on a fresh model.
    """
    fresh = case.attach_again(update_gap=LONG_GAP)
    if fresh is None or fresh.adapted.optimizer(_LR, _DECAY) is None:
        return skipped(subject, case, "resume", "the Method has no optimizer, or the case cannot attach again")
    beginning, tensors = case.attach_again(update_gap=LONG_GAP), fresh.adapted.tensors()
    start = {name: t.detach().clone() for name, t in tensors.items()}
    generator, found = case.generator(), []
    gradients = [{name: torch.randn(t.shape, generator=generator) for name, t in start.items()} for _ in range(3)]
    for bits in numbers_of_bits(fresh):
        _put(tensors, start)
        optimizer = new_optimizer(fresh, bits)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # adds `initial_lr` to the groups
        for group in optimizer.param_groups:
            group.setdefault("max_lr", _LR)  # as OneCycleLR does
            group.setdefault("name", "weights")  # as programs do
        empty = copy.deepcopy(optimizer.state_dict())
        for number in range(_STEPS_BEFORE):
            _step(optimizer, tensors, gradients[number])
        there, state = {name: t.detach().clone() for name, t in tensors.items()}, copy.deepcopy(optimizer.state_dict())
        saved = _state(optimizer)
        _step(optimizer, tensors, gradients[-1])
        want = {name: t.detach().clone() for name, t in tensors.items()}
        _put(tensors, there)
        resumed = new_optimizer(fresh, bits)
        resumed.load_state_dict(state)
        verdict = unchanged(_state(resumed), saved) if saved else None
        if verdict is None or verdict.passed:
            _step(resumed, tensors, gradients[-1])
            verdict = unchanged({name: t.detach() for name, t in tensors.items()}, want)
        if verdict.passed and beginning is not None:
            _put(tensors, start)
            resumed.load_state_dict(empty)
            _step(resumed, tensors, gradients[-1])
            anew = beginning.adapted.tensors()
            _put(anew, start)
            _step(new_optimizer(beginning, bits), anew, gradients[-1])
            verdict = unchanged({n: t.detach() for n, t in tensors.items()}, {n: t.detach() for n, t in anew.items()})
            verdict = prefix_tensor("after loading the state of a new optimizer", verdict)
            _put(anew, start)
        found.append(verdict if bits is None else prefix_tensor(f"with bits={bits}", verdict))
    _put(tensors, start)
    return judged(subject, case, "resume", worst_of(found, "exact"))


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of the tensors in an optimizer's state, by name."""
    states = optimizer.state_dict()["state"].items()
    named = ((f"state {p} {name}", value) for p, state in states for name, value in state.items())
    return {name: value.detach().clone() for name, value in named if isinstance(value, Tensor)}


def _put(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.data.copy_(values[name])
        tensor.grad = None


def _step(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.grad = gradients[name].to(tensor.device, tensor.dtype)
    optimizer.step()
