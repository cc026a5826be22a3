"""The call of an Operation that a benchmark times, and a check of this very call.

The parity checks use other tensors than the timed call. An implementation may therefore pass them and still return a
wrong result in the timed call. Public leaderboards of kernels met four such results: a result that was cached for the
same tensors; zeros after some calls; a tensor that is computed only when it is read; and a tensor that another thread
or stream is still writing.

So the values of the arguments change before each timed call, and results of the timed calls themselves are checked.
The type of every result is checked as well, because a lazy tensor computes the right values when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from random import Random

import torch
from torch import Tensor

from harness.bench import random_numbers
from harness.bench.results import TIMED_CALL
from harness.bench.timing import FreshProgram
from harness.conformance.case import Case
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.check_results import from_problems, judged
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.operation import Arguments, Operation, OperationSubject, cloned
from harness.conformance.subject import DTYPES
from harness.process.out_of_memory import shortage
from harness.records.check import CheckResult

PIECE = 2**24
"""Largest number of elements that a comparison of two tensors copies at once."""
CHANGED = 4096
"""Largest number of elements of an argument that change before a timed call."""
KEPT = 2
"""Number of timed calls whose results are kept for the check."""


@dataclass(frozen=True)
class Change:
    """New values of a few elements of one argument.

    Floating numbers become their initial values times `factor`. Other values, such as codes and ids, change places, so
    that each of them stays valid: they rotate by the share `factor` of their number.
    """

    name: str
    at: tuple[int | slice, ...]
    """Index of the elements, which are adjacent in the last dimension."""
    factor: float

    def apply(self, to: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> None:
        """Write the value into `to`. first: the arguments with their initial values.

        `to` must have been made by `.data`. Then the write does not increment the `_version` of the argument, like a
        write by a kernel. So a result that is cached for this version is wrong.
        """
        initial, piece = first[self.name][self.at], to[self.name][self.at]
        if piece.is_floating_point():
            torch.mul(initial, self.factor, out=piece)
        else:
            piece.copy_(piece.roll(1 + int(self.factor * (len(piece) - 1))))


class TimedCall(FreshProgram):
    """A call of an Operation on tensors that no other code uses.

    backward: True to compute also the gradients of all differentiable arguments, for random gradients of the outputs.
    If False, the call runs under `torch.no_grad`.
    """

    def __init__(
        self, operation: Operation, function: Callable[..., object], arguments: Arguments, *, backward: bool
    ) -> None:
        self.operation, self.function, self.arguments = operation, function, cloned(arguments)
        self.backward = backward
        self.original, self.first = arguments, operation_call.flatten(arguments)
        self.changes: list[list[Change]] = []
        """The changes of the arguments before each timed call so far."""
        self.kept: list[tuple[int, dict[str, Tensor]]] = []
        """Copies of results of timed calls, each with the number of the call, from 1."""
        self.odd: dict[str, str] = {}
        """For each name of a result that was no ordinary tensor in a timed call, the name of its type."""
        self.not_kept: Exception | None = None
        """The error for which a result could not be copied, because memory ran out."""
        self._random, self._to_keep = Random(), frozenset[int]()  # noqa: S311  seeded by the operating system
        self._aliases = {name: tensor.data for name, tensor in operation_call.flatten(self.arguments).items()}
        changing = {n: t.is_floating_point() for n, t in self.first.items() if t.dim() and t.numel()}
        self._changing = [found for kind in (True, False) if (found := [n for n in changing if changing[n] is kind])]
        self.leaves: dict[str, Tensor] = {}
        self.dys: list[Tensor] = []
        if backward:
            named = operation_call.flatten(self.arguments)
            self.leaves = {n: t for n, t in named.items() if n.partition("[")[0] in operation.differentiable}
            for leaf in self.leaves.values():
                leaf.requires_grad_(True)
            for number, y in enumerate(operation.named(function(**self.arguments)).values()):
                self.dys.append(
                    random_numbers.normal(y.shape, random_numbers.generator(y.device, number), y.device, y.dtype)
                )

    def __call__(self) -> tuple[object, tuple[Tensor | None, ...]]:
        """Return the outputs, and the gradients of the differentiable arguments (`leaves`)."""
        if not self.leaves:
            with torch.no_grad():
                return self.function(**self.arguments), ()
        returned = self.function(**self.arguments)
        outputs = list(self.operation.named(returned).values())
        return returned, torch.autograd.grad(outputs, list(self.leaves.values()), self.dys, allow_unused=True)

    def expect(self, calls: int) -> None:
        """Choose at random which of the next `calls` results to keep."""
        done = len(self.changes)
        self._to_keep = frozenset(done + 1 + number for number in self._random.sample(range(calls), min(KEPT, calls)))

    def prepare(self) -> None:
        """Change the arguments, so that the last result is no longer right.

        Up to CHANGED elements change in one random argument of floating numbers and in one random other argument.
        """
        self.changes.append([self._change(self._random.choice(names)) for names in self._changing])
        for change in self.changes[-1]:
            change.apply(self._aliases, self.first)

    def _change(self, name: str) -> Change:
        *outer, last = self.first[name].shape
        start = self._random.randrange(0, last, CHANGED)
        count = min(CHANGED, last - start)
        if not self.first[name].is_floating_point():  # rotations of equal length would soon restore earlier values
            count = self._random.randint(min(2, count), count)
        row = [self._random.randrange(size) for size in outer]
        return Change(name, (*row, slice(start, start + count)), self._random.uniform(0.25, 0.75))

    def receive(self, returned: tuple[object, tuple[Tensor | None, ...]]) -> None:
        """Note the types in the result of a timed call, and copy the result if `expect` has chosen it.

        The copy waits for no other thread or stream.
        """
        try:
            named = self._named(*returned)
            self.odd |= {name: type(t).__name__ for name, t in named.items() if type(t) is not Tensor}
            if len(self.changes) in self._to_keep:
                self.kept.append((len(self.changes), _copies(named)))
        except (MemoryError, RuntimeError) as error:
            if shortage(error) is None:
                raise
            self.not_kept = error

    def results(self) -> dict[str, Tensor]:
        """Call the Operation. Return outputs and gradients by name, e.g. `grad x`.

        A missing gradient counts as zero.
        """
        return self._named(*self())

    def _named(self, returned: object, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        found = zip(self.leaves.items(), gradients, strict=True)
        grads = {f"grad {name}": torch.zeros_like(leaf) if g is None else g for (name, leaf), g in found}
        return self.operation.named(returned) | grads

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite the tensors of the arguments in place. values: tensors by the names of `operation_call.flatten`."""
        for name, tensor in self._aliases.items():
            tensor.copy_(values[name])

    def check(self, dtype: str, fresh: Arguments, case: Case, *, by_reference: bool = True) -> CheckResult:
        """Check the kept results of timed calls. Then call the Operation with new values, and check these results.

        The results of all timed calls must have been ordinary tensors. by_reference: True to judge each kept result by
        the reference. False if the tensors are too large for the float64 reference: then a kept result that equals
        another call of the implementation passes unjudged.

        fresh: arguments with the new values, of the same shapes. They are written into the tensors of the timed call.
        The results must differ from the results with the old values, and must agree with a call on other tensors with
        the new values. They agree if they are equal to the last bit, or as accurate as the checks `outputs` and
        `backward` demand, because a kernel may sum in another order. The results are copied before any other work waits
        for the device. Afterwards this object has no tensors any more, so that large tensors are in memory only once.

        Raises MemoryError or RuntimeError if memory ran out while a result was copied.
        """
        subject = OperationSubject(self.operation, self.function, dtype, fresh, lambda: fresh)
        if self.odd:
            problems = [f"{name} is a {kind}, no Tensor" for name, kind in self.odd.items()]
            return from_problems(subject, case, TIMED_CALL, problems)
        if self.not_kept is not None:
            raise self.not_kept
        for kept, copies in self._kept_calls(dtype):
            same = _equal(copies, self._with(self.function, kept.arguments).results())
            if same and not by_reference:
                continue
            # Codes were judged by `output_codes` before timing, and its known defects do not prevent timing.
            verdict = worst_of([*self._judgements(kept, copies, case, codes=not same)], "as outputs and backward")
            if verdict.decided and not verdict.passed:
                return judged(kept, case, TIMED_CALL, verdict, "a result from the timing is wrong")
        old = _digests(self.results())
        self.fill(operation_call.flatten(fresh))
        copies = _copies(self.results())
        self.arguments, self.leaves, self.dys, self._aliases = {}, {}, [], {}
        if not _equal(copies, self._with(self.function, fresh).results()):
            return judged(
                subject,
                case,
                TIMED_CALL,
                worst_of([*self._judgements(subject, copies, case)], "as outputs and backward"),
            )
        same = any(t.numel() for t in copies.values()) and _digests(copies) == old
        return from_problems(
            subject,
            case,
            TIMED_CALL,
            ["with other values in the arguments, it returns the same result"] if same else [],
        )

    def _kept_calls(self, dtype: str) -> Iterator[tuple[OperationSubject, dict[str, Tensor]]]:
        """Yield the kept results, each with a subject that has the values of the arguments in that call."""
        given, done = cloned(self.original), 0
        tensors = operation_call.flatten(given)
        while self.kept:
            number, copies = self.kept.pop(0)
            for change in chain.from_iterable(self.changes[done:number]):
                change.apply(tensors, self.first)
            done = number
            yield OperationSubject(self.operation, self.function, dtype, given, lambda: given), copies

    def _with(self, function: Callable[..., object], arguments: Arguments) -> TimedCall:
        return TimedCall(self.operation, function, arguments, backward=self.backward)

    def _judgements(
        self, subject: OperationSubject, mine: dict[str, Tensor], case: Case, *, codes: bool = True
    ) -> Iterator[Judgement]:
        """Yield the judgement of the outputs and, if there are gradients, the judgement of the gradients.

        codes: False to leave out the judgement of quantisation codes.
        """
        gradients = {name: t for name, t in mine.items() if name.startswith("grad ")}
        outputs = {name: t for name, t in mine.items() if name not in gradients}
        yield operation_call.judge(subject, outputs, case)[0]
        if codes and subject.operation.codes is not None:
            yield operation_call.judge_codes(subject, subject.operation.codes, outputs, case)[0]
        if gradients:
            reference = self.operation.reference
            exactly = cloned(subject.arguments, {DTYPES[subject.dtype]: torch.float64})

            def computed(given: Arguments) -> dict[str, Tensor]:
                found = self._with(reference, given).results()
                return {name: found[name] for name in gradients}

            def draws() -> Iterator[dict[str, Tensor]]:
                yield computed(subject.arguments)
                yield from (computed(near.arguments) for near, _ in operation_call.perturbed_subjects(subject, case))

            yield noise_floor(gradients, computed(exactly), draws(), subject.dtype, case.factor("backward"))


def _copies(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in named.items()}


def _equal(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Return whether two results have the same names, shapes, dtypes and values. NaN equals NaN."""
    return ours.keys() == others.keys() and all(
        ours[name].shape == others[name].shape
        and ours[name].dtype == others[name].dtype
        and all(
            bool(((a == b) | (a.isnan() & b.isnan())).all())
            for a, b in zip(_pieces(ours[name]), _pieces(others[name]), strict=True)
        )
        for name in ours
    )


def _digests(named: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return a digest of the values of each tensor. 0.0 and -0.0 have the same digest."""
    found: dict[str, bytes] = {}
    for name, tensor in named.items():
        digest = blake2b()
        for piece in _pieces(tensor):
            digest.update((piece + 0).reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
        found[name] = digest.digest()
    return found


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor in slices of its first dimension, of about PIECE elements at most."""
    whole = tensor.detach().reshape(-1) if tensor.dim() == 0 else tensor.detach()
    yield from whole.split(max(1, PIECE * len(whole) // max(1, whole.numel())))
