"""Checks of an Operation (one function, such as a fused kernel) against its reference."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.distances import place
from harness.conformance.comparison.inputs import columns_of_wider
from harness.conformance.comparison.tolerance_policies import exact, rounded_once, worst_of
from harness.conformance.operation import Arguments, OperationSubject, cloned, mapped
from harness.conformance.poisoned_memory import poisoned_memory
from harness.conformance.subject import DTYPES
from harness.errors import Unsupported
from harness.process import forks
from harness.records import environment
from harness.records.record import CheckResult

_FORK_LIMITS = forks.Limits(cpu_s=11, memory_b=8 << 30)
"""The limit of wall time, ten times this CPU time, is below the time that `check` waits for a result."""


@check(calls_first=True)
def check_first_call(subject: OperationSubject, case: Case) -> CheckResult:
    """A call returns the right outputs and gradients after a call under the default dtype bfloat16.

    transformers loads a model while the model's dtype is torch's default dtype. A table that the first call of a process
    computes and keeps must not take that dtype. If another Operation shares the table and was called before, the check
    shows nothing. It runs once, before all other checks, in the typical case: in float32 if possible, because 16 bits hide
    that a table was rounded to them. Its calls are in a fork, so that a wrong table does not harm other checks. Only Linux
    forks safely, and only if no library can have used a GPU.
    """
    if sys.platform != "linux" or subject.device.type != "cpu" or environment.gpus():
        return skipped(subject, case, "first_call", "it needs a forked process: Linux, and no GPU")
    end = next(forks.run([None], lambda _: _after_other_default_dtype(subject, case), 1, _FORK_LIMITS))
    if end.died in ("SIGXCPU", "SIGALRM"):
        return skipped(subject, case, "first_call", f"no result after {_FORK_LIMITS.cpu_s} s of CPU time")
    if end.error:
        kind = Unsupported if end.kind == Unsupported.__name__ else getattr(builtins, end.kind, RuntimeError)
        raise kind(end.text) from RuntimeError(end.traceback)
    if end.died:
        raise RuntimeError(f"the forked process died of {end.died}")
    return CheckResult.model_validate_json(end.returned)


def _after_other_default_dtype(subject: OperationSubject, case: Case) -> str:
    """Call the Operation under another default dtype, then judge a second call, and return the result as JSON."""
    torch.set_num_threads(1)  # a fork has no other threads
    torch.set_default_dtype(torch.bfloat16)
    subject.call()
    torch.set_default_dtype(torch.float32)
    verdict, detail = operation_call.judge(subject, subject.call(), case)
    if verdict.passed and subject.operation.differentiable:
        with contextlib.suppress(Unsupported):  # such as gradients
            verdict, detail = operation_call.judge_gradients(subject, case, case.factor("backward")), ""
    after = "after a call under the default dtype bfloat16"
    found = judged(subject, case, "first_call", verdict, f"{after}; {detail}" if detail else after)
    return found.model_dump_json()


@check(in_brief_cases=True)
def check_outputs(subject: OperationSubject, case: Case) -> CheckResult:
    """Every output of the Operation has the reference's dtype, shape, device and values.

    An Operation may have its own rule for the values, for example for quantisation codes. Otherwise the errors must be
    within the noise floor: a multiple of the reference's rounding error in this dtype. A second call is under no_grad.
    """
    plain = subject.call()
    verdict, detail = operation_call.judge(subject, plain, case)
    if verdict.passed:
        with torch.no_grad():
            again = subject.call()
        quiet = operation_call.judge_form("under no_grad", subject, again, plain, case)
        verdict, detail = (verdict, detail) if quiet.passed else (quiet, "")
    return judged(subject, case, "outputs", verdict, detail)


@check(in_brief_cases=True)
def check_output_codes(subject: OperationSubject, case: Case) -> CheckResult:
    """Every code that the Operation returns stands for the nearest level. Halfway between two levels, both are right."""
    if subject.operation.codes is None:
        return skipped(subject, case, "output_codes", "this Operation returns no codes, or `outputs` judges them")
    found = operation_call.judge_codes(subject, subject.operation.codes, subject.call(), case)
    return judged(subject, case, "output_codes", *found)


@check(in_brief_cases=True)
def check_rounded_once(subject: OperationSubject, case: Case) -> CheckResult:
    """A result that needs one rounding equals the correctly rounded float64 result in nearly every element.

    The check `outputs` would not notice a second rounding, for example in a table of levels in bfloat16, nor a level
    near zero that is wrong by a few units in the last place. In float64 the check is skipped.
    """
    names = subject.operation.rounded_once
    if subject.dtype in ("bfloat16", "float16"):
        names += subject.operation.rounded_once_in_16_bits
    if not names or subject.dtype == "float64":
        return skipped(subject, case, "rounded_once", "the rule is for results of one rounding to 16 or 32 bits")
    seen = subject.call()
    if not operation_call.judge(subject, seen, case)[0].passed:
        return skipped(subject, case, "rounded_once", "the check `outputs` reports a larger error")
    truth = operation_call.reference_outputs(subject, torch.float64)
    mine = {name: tensor for name, tensor in seen.items() if name in names}
    terms = {name: subject.arguments.get(name, truth[name]) for name in mine}  # a parameter before its step
    return judged(subject, case, "rounded_once", rounded_once(mine, truth, terms))


@check(in_brief_cases=True)
def check_backward(subject: OperationSubject, case: Case) -> CheckResult:
    """The gradients of the Operation's differentiable arguments equal the reference's, including the dtype.

    A missing gradient counts as zero. But a tensor in a list that the call does not use, such as an adapter that no
    sequence of the batch chose, has the gradient None, as in the reference. With zeros, an optimizer would decay this
    adapter and move it along its old moments. An output without elements has a graph if the reference's has one, so that a
    backward pass does not raise an error.
    """
    if not subject.operation.differentiable:
        return skipped(subject, case, "backward", "this Operation has no gradient")
    verdict = operation_call.judge_gradients(subject, case, case.factor("backward"))
    if verdict.passed and (problems := _needless_gradients(subject, case) + _without_graph(subject)):
        return from_problems(subject, case, "backward", problems)
    return judged(subject, case, "backward", verdict)


@check(depends_on_sizes=False, in_minor_examples=True)
def check_arguments(subject: OperationSubject, case: Case) -> CheckResult:
    """A call does not change its arguments, with or without gradients.

    Its backward pass changes neither the arguments nor the incoming gradients.
    """
    given, without = cloned(subject.arguments), cloned(subject.arguments)
    subject.function(**given)
    with torch.no_grad():
        subject.function(**without)
    arguments = operation_call.flatten(subject.arguments)
    seen = {f"argument {name} after a call": t for name, t in operation_call.flatten(given).items()}
    seen |= {f"argument {name} after a call under no_grad": t for name, t in operation_call.flatten(without).items()}
    before = {f"argument {name} after a call": t for name, t in arguments.items()}
    before |= {f"argument {name} after a call under no_grad": t for name, t in arguments.items()}
    if subject.operation.differentiable:
        given = cloned(subject.arguments)
        operation_call.require_gradients(subject, given)
        outputs = subject.operation.named(subject.function(**given))
        incoming = operation_call.incoming_gradients(outputs, case)
        kept = cloned(incoming)
        operation_call.backward(outputs, {}, case, incoming=incoming)
        after = operation_call.flatten(given)
        seen |= {f"argument {name} after the backward pass": t.detach() for name, t in after.items()}
        seen |= {f"the incoming gradient of {name}": dy for name, dy in incoming.items()}
        before |= {f"argument {name} after the backward pass": t for name, t in arguments.items() if name in after}
        before |= {f"the incoming gradient of {name}": dy for name, dy in kept.items()}
    return judged(subject, case, "arguments", exact(seen, before))


@check(in_minor_examples=True, in_brief_cases=True)
def check_repeatable(subject: OperationSubject, case: Case) -> CheckResult:
    """Two calls with the same arguments return the same results, to the last bit.

    A call with other numbers in between changes nothing that the first call returned. If these numbers are then written
    into the tensors of the first call, by way of `.data`, a third call with those tensors returns what the call in between
    returned.
    Other numbers are tried in the typical case, in every case in float32 and, with `--wide`, in every example.
    """
    given = cloned(subject.arguments)
    first = subject.operation.named(subject.function(**given))
    kept = {name: t.detach().clone() for name, t in first.items()}
    if case.is_brief and subject.dtype != "float32":
        return judged(subject, case, "repeatable", exact(subject.call(), kept))
    other = replace(subject, arguments=subject.another())
    alone = other.call()
    found = [prefix_tensor("after a later call", exact(first, kept))]
    # The same tensors as in the first call, once more just before their numbers change: a cache may hold only one result.
    found.append(exact(subject.operation.named(subject.function(**given)), kept))
    if (changed := _overwritten(given, other.arguments)) is not None:
        again = subject.operation.named(subject.function(**changed))
        found.append(operation_call.judge_form("with changed arguments", other, again, alone, case))
    return judged(subject, case, "repeatable", worst_of(found, "exact"))


def _overwritten(arguments: Arguments, by: Arguments) -> Arguments | None:
    """Return `by` with the tensors of `arguments`, after the numbers of `by` were written into them.

    Return None if a tensor has another shape or dtype than the one that it would replace.
    """
    held, numbers = operation_call.flatten(arguments), operation_call.flatten(by)
    if {n: (t.shape, t.dtype) for n, t in held.items()} != {n: (t.shape, t.dtype) for n, t in numbers.items()}:
        return None
    for name, tensor in held.items():
        tensor.data.copy_(numbers[name])
    replaced = {id(tensor): held[name] for name, tensor in numbers.items()}
    return mapped(by, lambda one: replaced.get(id(one), one))


@check()
def check_layouts(subject: OperationSubject, case: Case) -> CheckResult:
    """The outputs do not depend on the memory layout of the arguments.

    Five layouts are tried for every tensor: a view with gaps between its elements, some columns of a wider tensor, a
    tensor that is transposed in memory as a `.T` is, one whose batch and tokens are transposed in memory, and a contiguous
    slice that does not begin at the start of its storage. A 0-d tensor does not begin there either. The outputs equal
    those for contiguous arguments to the last bit, or pass the rules of the checks `outputs` and `output_codes`.
    """
    plain, found = subject.call(), []
    changes = {
        "every second element": _gapped,
        "transposed": _transposed,
        "slice": _sliced,
        "columns": columns_of_wider,
    }
    if any(tensor.dim() > 2 for tensor in operation_call.flatten(subject.arguments).values()):
        changes["batch and tokens transposed"] = _swapped
    for name, change in changes.items():
        mine, again = (mapped(cloned(subject.arguments), partial(_changed, change)) for _ in range(2))
        seen = subject.operation.named(subject.function(**mine))
        found.append(operation_call.judge_form(name, subject, seen, plain, case, again))
    return judged(subject, case, "layouts", worst_of(found, "exact"))


@check(only_wide=True, also_in_typical_case=True)
def check_nonfinite(subject: OperationSubject, case: Case) -> CheckResult:
    """A NaN in an argument reaches every output that it reaches in the reference.

    The check sets one element to NaN, in each floating-point argument in turn. Where the reference returns NaN in the
    case's dtype and in float64, the Operation returns NaN or infinity. A finite number would hide the fault from
    training. In bfloat16 alone, a matrix product of oneDNN may spread a NaN to other rows. The Operation may also raise
    LinAlgError, as torch.linalg.pinv does for a NaN. With a learning rate of 0, it may leave a parameter as it is. In
    LAMB, a norm spreads the NaN over the whole parameter. There, only the elements that it reaches without the norm count.
    """
    if 0 in (subject.arguments.get("scaling"), *subject.arguments.get("scalings", ())):
        return skipped(subject, case, "nonfinite", "an update that is scaled by 0 need not be computed")
    odd: list[str] = []
    excused = _unchanged(subject) if subject.arguments.get("lr") == 0 else ()
    for name, tensor in operation_call.flatten(subject.arguments).items():
        if not tensor.is_floating_point() or not tensor.numel() or not tensor.dim():
            continue
        given = cloned(subject.arguments)
        operation_call.flatten(given)[name][place(tensor.numel() // 2, tensor.shape)] = torch.nan
        wider = cloned(given, {DTYPES[subject.dtype]: torch.float64})
        reach = subject.operation.without_norm or subject.operation.reference
        want, certain = (subject.operation.named(reach(**one)) for one in (cloned(given), wider))
        try:
            mine = subject.operation.named(subject.function(**given))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        for output, expected in want.items():
            if output not in excused and bool(
                (expected.isnan() & certain[output].isnan() & mine[output].isfinite()).any()
            ):
                odd.append(f"a NaN in {name} does not reach {output}")
    return from_problems(subject, case, "nonfinite", odd)


@check(depends_on_sizes=False, in_minor_examples=True)
def check_written(subject: OperationSubject, case: Case) -> CheckResult:
    """No output and no gradient contains uninitialised memory.

    Every newly allocated buffer is filled with NaN or the largest integer
    (`torch.utils.deterministic.fill_uninitialized_memory`), and no result may contain these values.
    """
    dtype, differentiable = DTYPES[subject.dtype], bool(subject.operation.differentiable)

    def seen() -> dict[str, Tensor]:
        gradients = operation_call.gradients(subject, subject.function, dtype, case) if differentiable else {}
        return {n: t.detach().clone() for n, t in subject.call().items()} | gradients

    clean = seen()
    with poisoned_memory():
        poisoned = seen()
    odd = [
        f"{name} holds what was never written"
        for name, t in poisoned.items()
        if bool((t.isnan() & ~clean[name].isnan()).any() if t.is_floating_point() else (t != clean[name]).any())
    ]
    return from_problems(subject, case, "written", odd)


def _unchanged(subject: OperationSubject) -> list[str]:
    """Return the names of the outputs that equal an argument, such as a parameter that a step leaves as it is."""
    given = [*operation_call.flatten(subject.arguments).values()]
    outputs = operation_call.reference_outputs(subject, DTYPES[subject.dtype])
    return [name for name, output in outputs.items() if any(torch.equal(output, one) for one in given)]


def _needless_gradients(subject: OperationSubject, case: Case) -> list[str]:
    """Describe each tensor in a list of arguments that gets a gradient of zeros, and that gets none in the reference."""

    def leaves_of(function: Callable[..., object]) -> dict[str, Tensor]:
        outputs, leaves = operation_call.forward(subject, function, DTYPES[subject.dtype])
        operation_call.backward(outputs, leaves, case)
        return leaves

    if not any(name.endswith("]") for name in operation_call.flatten(subject.arguments)):
        return []
    zeros = [
        n for n, t in leaves_of(subject.function).items() if n.endswith("]") and t.grad is not None and not t.grad.any()
    ]
    right = leaves_of(subject.operation.reference) if zeros else {}
    return [
        f"{name} is not used, and its gradient is zeros instead of None" for name in zeros if right[name].grad is None
    ]


def _without_graph(subject: OperationSubject) -> list[str]:
    """Describe each output without elements that has no graph, and that has one in the reference."""
    if all(output.numel() for output in operation_call.reference_outputs(subject, torch.float64).values()):
        return []
    mine, right = (
        operation_call.forward(subject, function, DTYPES[subject.dtype])[0]
        for function in (subject.function, subject.operation.reference)
    )
    return [
        f"{name} has no elements and no graph, so a backward pass raises an error"
        for name, output in right.items()
        if output.requires_grad and not output.numel() and not mine[name].requires_grad
    ]


def _changed(change: Callable[[Tensor], Tensor], one: object) -> object:
    """Return a tensor after `change`. A 0-d tensor becomes the second item of a vector. Anything else stays as it is."""
    if isinstance(one, Tensor):
        return change(one) if one.dim() else torch.stack([one + 1, one])[1]
    return one


def _odd(tensor: Tensor, *shape: int) -> Tensor:
    """Return a tensor of the dtype of `tensor` full of NaN or, if `tensor` holds integers, of the largest integer."""
    return tensor.new_full(shape, torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def _gapped(tensor: Tensor) -> Tensor:
    """Return an equal tensor that has a gap after each element in memory."""
    wide = _odd(tensor, *tensor.shape, 2)
    wide[..., 0] = tensor
    return wide[..., 0]


def _sliced(tensor: Tensor) -> Tensor:
    """Return an equal tensor that is a contiguous slice and does not begin at the start of its storage."""
    return torch.cat([_odd(tensor, 1, *tensor.shape[1:]), tensor])[1:]


def _transposed(tensor: Tensor) -> Tensor:
    """Return an equal tensor whose first and last dimensions are swapped in memory. A vector stays as it is."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _swapped(tensor: Tensor) -> Tensor:
    """Return an equal tensor whose first two dimensions are swapped in memory. One with fewer than three stays as it is."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 2 else tensor
