"""An implementation taken through the parity suite of its Method or Operation, case by case, in this process."""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch

from harness.conformance import checks, operations, parity_suite, process_settings
from harness.conformance.case import Case
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.execution.parity_model import TARGETS, ParityModel, whole
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.operation import OperationSubject
from harness.conformance.subject import (
    DTYPES,
    ExpectedCodes,
    Original,
    PackedLayer,
    ReferenceLayer,
    Subject,
    adaptable_layers,
    attach_reference,
    configure,
    warm,
)
from harness.errors import Unsupported
from harness.methods.registry import Implementation
from harness.records.record import CheckResult, Outcome

SEED = 20
CPU = torch.device("cpu")
_T = TypeVar("_T")
_AT_INIT_ONLY = ("base", "identity", "initial", "detach", "settings")
_WARM_SHOWS = (
    "strides", "vector", "dropout", "step", "trajectory", "merge", "save", "deterministic", "poison", "inputs", "overlap",
)  # fmt: skip
"""Checks that at the start, where most updates are zero, see nothing that they do not see when warm."""


def run(
    implementation: Implementation,
    *,
    breadth: CaseSelection = FEW,
    dtypes: tuple[str, ...] = (),
    begin: Callable[[str], None] | None = None,
) -> Iterator[CheckOutcome]:
    """Yield every check of every case; dtypes: only these, if any are given; begin: is told of each case before it.

    An exception inside a check or inside the implementation is a failure of that check or of `attach`; a
    harness.Unsupported from the implementation means that it does not offer the case.
    """
    wanted = [dtype for dtype in implementation.dtypes if dtype in (dtypes or implementation.dtypes)]
    cases = (_operation if implementation.kind == "operation" else _method)(implementation, breadth, wanted)
    for words, dtype, tries in cases:
        if begin is not None:
            begin(f"{words} {dtype}")
        for result in tries():
            yield CheckOutcome(
                implementation=implementation.name,
                kind=implementation.kind,
                target=implementation.target,
                dtype=dtype,
                case=words,
                result=result,
            )


Tries = Callable[[], Iterator[CheckResult]]


def _method(
    implementation: Implementation, breadth: CaseSelection, dtypes: Collection[str]
) -> Iterator[tuple[str, str, Tries]]:
    plan = parity_suite.load(implementation.target)
    for case in plan.cases(breadth, dtypes):

        def tries(case: parity_suite.MethodCase = case) -> Iterator[CheckResult]:
            yield from one_case(implementation, plan, case)

        yield str(case), case.dtype, tries


def one_case(
    implementation: Implementation,
    plan: parity_suite.ParitySuite,
    of: parity_suite.MethodCase,
    device: torch.device = CPU,
) -> Iterator[CheckResult]:
    """Yield the checks of one case of a Method, or of a quantised base, each in the states in which it sees most."""
    start = f"{plan.method}/attach/{of.dtype}/init"
    with process_settings.kept() as disturbed:  # by the imports, perhaps, that the first attaching does
        made = _guarded(start, lambda: attach(implementation, plan, of, device))
    if isinstance(made, CheckResult):
        yield made
        return
    subject, case = made
    subject.disturbed += disturbed

    def warm_up() -> None:
        warm(subject.added(), case.generator(salt=1))

    for state in plan.states:
        at = dataclasses.replace(case, state=state)
        if state == "warm":
            odd = _guarded(start, warm_up)
            if odd is not None:
                yield odd
                return
        for name in plan.checks:
            elsewhere = _AT_INIT_ONLY if state == "warm" else _WARM_SHOWS if "warm" in plan.states else ()
            if name not in elsewhere:
                yield tried(name, subject, at, f"{plan.method}/{name}/{of.dtype}/{state}")


def attach(
    implementation: Implementation,
    plan: parity_suite.ParitySuite,
    of: parity_suite.MethodCase,
    device: torch.device = CPU,
) -> tuple[Subject, Case]:
    """Attach an implementation to a fresh parity model on `device`; return it and the case around it."""
    method = plan.method

    def built(shape: parity_suite.CaseShape) -> ParityModel:
        return ParityModel(of.kind, shape, DTYPES[of.dtype], SEED).eval().to(device)

    pristine = built(of.shape)
    twins: dict[
        tuple[str, str], ReferenceLayer
    ] = {}  # one weight, one config: one reference, of every subject made here

    def fresh(*, seed: int = SEED, square: bool = False, **changed: Any) -> Subject:
        model = built(of.shape.square()) if square else copy.deepcopy(pristine)
        settled = configure(method, of.config | changed)
        if hasattr(settled, "targets"):
            settled = dataclasses.replace(settled, targets=TARGETS)
        bases = _adaptable(model, settled)
        packed: dict[str, PackedLayer] = {}
        expected: dict[str, ExpectedCodes] = {}
        if plan.base:
            expected = {path: ExpectedCodes.of(layer) for path, layer in bases.items()}
            forms = implementation(model, list(bases), DTYPES[of.dtype])
            packed = {path: PackedLayer(*form) for path, form in forms.items()}
            bases = _adaptable(model, settled)
        original, own = Original.of(model), list(model.parameters())
        generator = torch.Generator().manual_seed(seed)
        if plan.base:
            adapted = attach_reference(method, model, settled, None, generator)
        else:
            adapted = implementation(model, settled, generator)
        # Not where config or weights are others, nor on a base of which somebody else might make something else each time.
        shared = {} if changed or square or plan.base else twins
        return Subject(method, settled, of.dtype, model, adapted, bases, own, original, packed, expected, twins=shared)

    subject = fresh()
    run_model, forward = whole(subject.model)
    case = Case(
        "init", tokens=of.shape.tokens, seed=SEED, inputs=run_model, base_output=whole(subject.original.model)[0](),
        forward=forward, fresh=fresh, factors=plan.factors(),
    )  # fmt: skip
    return subject, case


def _adaptable(model: ParityModel, config: Any) -> dict[str, Any]:
    if hasattr(config, "targets"):
        return {name: model.get_submodule(name) for name in TARGETS}
    return adaptable_layers(model, config)


def _operation(
    implementation: Implementation, breadth: CaseSelection, dtypes: Collection[str]
) -> Iterator[tuple[str, str, Tries]]:
    plan = parity_suite.load_operation(implementation.target)
    for values, dtype in plan.calls(breadth, dtypes):

        def tries(values: dict[str, Any] = values, dtype: str = dtype) -> Iterator[CheckResult]:
            yield from one_call(implementation, plan, values, dtype)

        yield parity_suite.in_words(values), dtype, tries


def one_call(
    implementation: Implementation, plan: parity_suite.OperationSuite, values: dict[str, Any], dtype: str
) -> Iterator[CheckResult]:
    """Yield every check of one case of an Operation."""
    operation = operations.every()[plan.operation]

    def drawn(seed: int) -> dict[str, Any]:
        return operation.arguments(DTYPES[dtype], torch.Generator().manual_seed(seed), **values)

    subject = OperationSubject(operation, implementation, dtype, drawn(SEED), lambda: drawn(SEED + 1))
    case = Case("call", seed=SEED, factors=plan.factors())
    for name in plan.checks:
        yield tried(name, subject, case, f"{operation.name}/{name}/{dtype}/call")


def tried(name: str, subject: Any, case: Case, identifier: str) -> CheckResult:
    """Try one check; an exception in it is a failure that says what was raised and where."""

    def check() -> CheckResult:
        # What one check does to the process is a finding of `settings`, and no other's.
        with torch.random.fork_rng(), process_settings.kept():
            process_settings.seed(SEED)
            return checks.every()[name](subject, case)

    return _guarded(identifier, check)


def _guarded(identifier: str, act: Callable[[], _T]) -> _T | CheckResult:
    """Return what `act` returns; or, if it raises, what that says of the implementation."""
    try:
        return act()
    except Unsupported as error:
        return CheckResult(check=identifier, outcome=Outcome.SKIPPED, detail=f"unsupported: {error}")
    except Exception as error:  # noqa: BLE001  # somebody else's code: whatever it raises is a finding about it
        return CheckResult(check=identifier, outcome=Outcome.FAIL, detail=_raised(error))


def _raised(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({last.filename.rpartition('/')[2]}:{last.lineno})"
