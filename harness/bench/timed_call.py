"""The call of an Operation that a benchmark times, and a check of this very call after timing.

The parity checks use other tensors than the timed call. An implementation may therefore pass them and still return a
wrong result in the timed call. Public leaderboards of kernels met four such results: a result that was cached for the
same tensors; zeros after some calls; a tensor that is computed only when it is read; and a tensor that another thread
or stream is still writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from harness.bench import random_numbers
from harness.bench.results import TIMED_CALL
from harness.conformance.case import Case
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.check_results import from_problems, judged
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.operation import Arguments, Operation, OperationSubject, cloned
from harness.conformance.subject import DTYPES
from harness.records.check import CheckResult

PIECE = 2**24
"""Largest number of elements that a comparison of two tensors copies at once."""


class TimedCall:
    """A call of an Operation on tensors that no other code uses.

    backward: True to compute also the gradients of all differentiable arguments, for random gradients of the outputs.
    If False, the call runs under `torch.no_grad`.
    """

    def __init__(
        self, operation: Operation, function: Callable[..., object], arguments: Arguments, *, backward: bool
    ) -> None:
        self.operation, self.function, self.arguments = operation, function, cloned(arguments)
        self.backward = backward
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

    def results(self) -> dict[str, Tensor]:
        """Call the Operation. Return outputs and gradients by name, e.g. `grad x`.

        A missing gradient counts as zero.
        """
        returned, gradients = self()
        found = zip(self.leaves.items(), gradients, strict=True)
        grads = {f"grad {name}": torch.zeros_like(leaf) if g is None else g for (name, leaf), g in found}
        return self.operation.named(returned) | grads

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite the tensors of the arguments in place. values: tensors by the names of `operation_call.flatten`."""
        with torch.no_grad():
            for name, tensor in operation_call.flatten(self.arguments).items():
                tensor.copy_(values[name])

    def check(self, dtype: str, fresh: Arguments, case: Case) -> CheckResult:
        """Write new values into the tensors of the timed call, call the Operation again, and check the results.

        fresh: arguments with the new values, of the same shapes. The results must be ordinary tensors, must differ from
        the results with the old values, and must agree with a call on other tensors with the new values. They agree if
        they are equal to the last bit or, because a kernel may sum in another order, as accurate as the checks
        `outputs` and `backward` demand. The results are copied before any other work waits for the device. Afterwards
        this object has no tensors any more, so that large tensors are in memory only once.
        """
        subject = OperationSubject(self.operation, self.function, dtype, fresh, lambda: fresh)
        old = _digests(self.results())
        self.fill(operation_call.flatten(fresh))
        returned = self.results()
        copies = {name: t.detach().clone() for name, t in returned.items()}
        if odd := [
            f"{name} is a {type(t).__name__}, no Tensor" for name, t in returned.items() if type(t) is not Tensor
        ]:
            return from_problems(subject, case, TIMED_CALL, odd)
        del returned
        self.arguments, self.leaves, self.dys = {}, {}, []
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

    def _with(self, function: Callable[..., object], arguments: Arguments) -> TimedCall:
        return TimedCall(self.operation, function, arguments, backward=self.backward)

    def _judgements(self, subject: OperationSubject, mine: dict[str, Tensor], case: Case) -> Iterator[Judgement]:
        """Yield the judgement of the outputs and, if there are gradients, the judgement of the gradients."""
        gradients = {name: t for name, t in mine.items() if name.startswith("grad ")}
        outputs = {name: t for name, t in mine.items() if name not in gradients}
        yield from (one for one, _ in operation_call.judgements(subject, outputs, case))
        if gradients:
            own, reference = DTYPES[subject.dtype], self.operation.reference
            exactly = cloned(subject.arguments, {own: torch.float64})
            truth, rounded = (self._with(reference, given).results() for given in (exactly, subject.arguments))
            exact_ones, own_ones = ({name: found[name] for name in gradients} for found in (truth, rounded))
            yield noise_floor(gradients, exact_ones, own_ones, subject.dtype, case.factor("backward"))


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
