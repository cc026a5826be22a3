"""A Hypothesis state machine for random walks. Each rule does one thing to an implementation and to the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, reject, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import Judgement, carried_noise
from harness.conformance.tolerance_constants import HOPELESS, PERTURBED_DRAWS, UNLUCKY
from harness.conformance.walk.program import RUN_MODES, Program

RULES = 20
"""Largest number of rules in one walk."""
REPEATS = 100
"""Number of further walks, after the first failure, in which Hypothesis looks for a shorter walk that fails."""


@dataclass(frozen=True)
class Programs:
    """The programs that take the same walk: one of the implementation under test (`subject`), and three or more of the
    reference.
    """

    subject: Program
    wide: Program
    """The reference in float64."""
    own: Program
    """The reference in the subject's dtype."""
    near: Program
    """The reference in the subject's dtype. Its tensors are slightly moved, so that it rounds differently from `own`."""
    dtype: str
    factor: float
    """Largest allowed error of the subject, as a multiple of the reference's own error."""
    another: Callable[[], Program]
    """Function that attaches the subject's implementation to a second model, and returns a Program with this model."""
    drawn: tuple[Program, ...] = ()
    """References in the subject's dtype, each of which rounds every result at random."""

    def every(self) -> tuple[Program, ...]:
        """Return the programs: the subject, the reference in float64, then those in the subject's dtype."""
        return self.subject, self.wide, self.own, self.near, *self.drawn

    def align(self) -> None:
        """Load the subject's tensors and state into the references. `near` gets slightly moved tensors.

        Later comparisons then do not count earlier rounding errors.
        """
        tensors, state = self.subject.adapted.tensors(), self.subject.adapted.state()
        generator = torch.Generator().manual_seed(self.subject.steps)
        moved = {name: perturbed(t.detach(), self.dtype, generator) for name, t in tensors.items()}
        for program in (self.wide, self.own, *self.drawn):
            program.sync(tensors, state)
        self.near.sync(moved, state)


class WalkFailedError(AssertionError):
    """The implementation differs from the reference. rules: the rules of the walk up to this point."""

    def __init__(self, judgement: Judgement, rules: list[str]) -> None:
        super().__init__(judgement.tensor)
        self.judgement, self.rules = judgement, rules


def walk(make: Callable[[int], Programs], walks: int, number: int) -> WalkFailedError | None:
    """Take `walks` random walks. Return the failure of the shortest walk that fails. If none fails, return None.

    make: makes the programs of a walk, always in the same state, with the given number of `Programs.drawn`. number: seed
    of the walks. An exception that a program raises in a rule such as `merge` or `backward` gets a note with the rules
    of the walk.
    """

    class Walk(AdapterWalk):
        start = staticmethod(make)
        shortest = None
        repeats = 0

    chosen = settings(
        max_examples=walks,
        stateful_step_count=RULES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )
    try:
        run_state_machine_as_test(seed(number)(Walk), settings=chosen)
    except (WalkFailedError, Flaky):  # flaky: a rule fails at only some calls, or no walk is left for the last repeat
        if Walk.shortest is None:
            raise
    return Walk.shortest


class AdapterWalk(RuleBasedStateMachine):
    """One random walk. Every rule does the same to each program. Some rules then compare the programs."""

    start: Callable[[int], Programs]
    draws = 0
    """Number of references that round at random. 0 unless a failing walk is taken again."""
    shortest: WalkFailedError | None
    """The failure of the shortest walk so far."""
    repeats: int
    """Number of walks since the first failure."""

    def __init__(self) -> None:
        super().__init__()
        if self.shortest is not None:
            type(self).repeats += 1
            if self.repeats > REPEATS:
                reject()
        self.programs = type(self).start(self.draws)
        self.taken: list[str] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []  # the same rules, as names and arguments
        self.merged = self.frozen = self.interrupted = False
        self.comparisons = 0
        self.latest_doubt = 0  # the number of the last comparison that `own` and `near` alone do not explain

    @invariant()
    def end_of_rule(self) -> None:
        """Record that the latest rule ended without an exception."""
        self.interrupted = False

    def _take(self, text: str, *arguments: Any) -> None:
        self.taken.append(text)
        self.calls.append((text.partition("(")[0], arguments))
        self.interrupted = True

    def _all(self, text: str, act: Callable[[Program], None], *arguments: Any) -> None:
        """Note the rule that `text` shows, and let every program `act`. arguments: those of the rule."""
        self._take(text, *arguments)
        for program in self.programs.every():
            try:
                act(program)
            except Exception as error:
                error.add_note("; ".join(["attach()", *self.taken]))
                raise

    def _compare(self, mode: str) -> None:
        """Compare the outputs and gradients of all programs. mode: how to run the models, a key of RUN_MODES."""
        self._judge(*(program.run(mode) for program in self.programs.every()))

    def _compare_numbers(self) -> None:
        """Compare the trained tensors and the states that the implementation and the reference both have."""
        mine, *others = (program.tensors_and_state() for program in self.programs.every())
        names = [name for name in mine if name in others[0] and mine[name].shape == others[0][name].shape]
        if not names:  # e.g. of GaLore, whose tensors are the weights that need a gradient
            return
        self._judge(*({name: one[name] for name in names} for one in (mine, *others)))

    def _judge(self, mine: dict[str, Tensor], truth: dict[str, Tensor], *rounded: dict[str, Tensor]) -> None:
        self.comparisons += 1
        own_and_near = rounded[: len(rounded) - self.draws]
        judgement = carried_noise(mine, truth, own_and_near, self.programs.dtype, self.programs.factor)
        if judgement.passed or not judgement.decided:
            return
        self.latest_doubt = self.comparisons
        if self.draws:
            judgement = carried_noise(mine, truth, rounded, self.programs.dtype, self.programs.factor)
            if judgement.passed:
                return
        elif self._is_explained(judgement):
            return
        failure = WalkFailedError(judgement, list(self.taken))
        if self.shortest is None or len(self.taken) <= len(self.shortest.rules):
            type(self).shortest = failure
        raise failure

    def _is_explained(self, judgement: Judgement) -> bool:
        """Take the walk again with more references, which round at random. Return whether their errors explain the failure.

        `own` and `near` are too few where one rounding decides the error of a whole tensor: both may round that number
        well. AdaLoRA has two such numbers: A A^T - 1 of rank 1, and the difference of a sensitivity and its average. A
        passing walk does not need the further references, so only a failing walk pays for them. In bfloat16, they
        would excuse a scaling that is 6 % off, so such a walk is not taken again. In float16, it is taken again only if
        its error is at most UNLUCKY times the allowance.

        If the same comparison does not fail again with `own` and `near`, the implementation computes something else each
        time, and rounding is no explanation. Once a failure is confirmed, a large error in a shorter walk counts without a
        second look, to save time.
        """
        is_hopeless = self.shortest is not None and judgement.ratio > HOPELESS
        is_hopeless |= self.programs.dtype == "float16" and judgement.ratio > UNLUCKY
        if is_hopeless or judgement.error is None or self.programs.dtype == "bfloat16":
            return False
        again = type("Again", (type(self),), {"draws": PERTURBED_DRAWS, "shortest": None})()
        try:
            for name, arguments in self.calls:
                getattr(again, name)(*arguments)
                again.end_of_rule()
        except WalkFailedError:
            return False
        return bool(again.latest_doubt == self.comparisons)

    @rule(mode=st.sampled_from(list(RUN_MODES)))
    @precondition(lambda self: not self.merged)
    def compare(self, mode: str) -> None:
        """Run the model of every program in a mode of RUN_MODES, and compare outputs and gradients."""
        self._take(f"compare({mode!r})", mode)
        self._compare(mode)

    @rule(number=st.integers(1, 9))
    @precondition(lambda self: not self.merged and not self.frozen)
    def backward(self, number: int) -> None:
        """Run forward and backward on one micro-batch. Gradients are added up. number: seed of the gradient of the
        output.
        """
        self._all(f"backward({number})", lambda program: program.backward(number), number)

    @rule(number=st.integers(1, 9))
    @precondition(lambda self: not self.merged and not self.frozen)
    def step(self, number: int) -> None:
        """Add the gradients of one more micro-batch, take an optimizer step, and compare the tensors and the state.

        number: seed of the gradient of the output.
        """
        self._all(f"step({number})", lambda program: program.backward(number), number)
        for program in self.programs.every():
            program.step()
        self._compare_numbers()
        self.programs.align()

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def scheduler(self, factor: float) -> None:
        """Multiply the learning rate by `factor`."""
        self._all(f"scheduler({factor})", lambda program: program.scale_learning_rate(factor), factor)

    @rule(training=st.booleans())
    @precondition(lambda self: not self.merged)
    def train(self, training: bool) -> None:
        """Put the models in training mode if `training` is true and `Program.may_train` allows it, else in eval mode."""
        self._all(f"train({training})", lambda program: program.set_training(training), training)

    @rule()
    @precondition(lambda self: not self.merged and self.programs.subject.owns_tensors())
    def deepcopy(self) -> None:
        """Continue with a deep copy of model, adapter and optimizer, change the original, and compare the copies."""
        self._all("deepcopy()", Program.deepcopy)
        self._compare_numbers()
        self._compare("backward")

    @rule()
    @precondition(lambda self: not self.merged and self.programs.subject.owns_tensors())
    def load_state_dict(self) -> None:
        """Copy the model's state_dict, change the adapter's tensors, load the copy, and compare."""
        self._all("load_state_dict()", Program.reload_model)
        self._compare("backward")

    @rule()
    @precondition(lambda self: not self.merged and not self.frozen)
    def resume(self) -> None:
        """Continue from a checkpoint in a fresh model, and compare."""
        self._all("resume()", Program.resume)
        self._compare("backward")

    @rule()
    @precondition(lambda self: not self.merged and self.programs.subject.adapted.can_merge)
    def merge(self) -> None:
        """Merge every program's adapter, and compare the outputs of the merged models."""
        self._all("merge()", Program.merge)
        self.merged = True
        self._compare("no_grad")

    @rule()
    @precondition(lambda self: self.merged)
    def unmerge(self) -> None:
        """Undo the merge, and compare the outputs."""
        self._all("unmerge()", Program.unmerge)
        self.merged = False
        self._compare("no_grad")

    @rule()
    @precondition(lambda self: not self.merged)
    def requires_grad(self) -> None:
        """Switch the gradients of the adapter off, or on again."""
        self.frozen = not self.frozen
        self._all(f"requires_grad({not self.frozen})", lambda program: program.freeze(self.frozen))

    @rule()
    def second_model(self) -> None:
        """Attach another adapter to a second model with other shapes, and train the second model for one step."""
        self._take("second_model()")
        other = self.programs.another()
        other.backward(1)
        other.step()

    def teardown(self) -> None:
        """Compare the programs at the end, unless they are merged or the last rule raised."""
        if not self.merged and not self.interrupted:
            self.calls.append(("teardown", ()))
            self._compare("backward")
