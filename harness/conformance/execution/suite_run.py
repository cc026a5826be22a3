"""Run a parity suite in this process: try every check in every case of an implementation."""

from __future__ import annotations

import dataclasses
import functools
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from harness.conformance import checks, operations, parity_suite, process_settings
from harness.conformance.adapter_files.subject import LoaderSubject, corpus_adapter
from harness.conformance.case import Case
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.checks import States
from harness.conformance.comparison.magnitudes import vary
from harness.conformance.drawing import sample
from harness.conformance.execution import long_sums
from harness.conformance.execution.parity_model import ParityModel, whole
from harness.conformance.findings.outcomes import CheckOutcome, DeviceLostError, Execution
from harness.conformance.operation import Arguments, OperationSubject, moved
from harness.conformance.packing import pack
from harness.conformance.parity_suite import (
    AnyCase,
    LoaderCase,
    LoaderSuite,
    MethodCase,
    MethodSuite,
    OperationCase,
    OperationSuite,
    ParitySuite,
)
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
from harness.methods.module_copy import copied
from harness.methods.registry import Implementation, sibling
from harness.records.check import CheckId, CheckResult, Outcome

SEED = 20
WALKS = 8
"""Number of random walks (sequences of calls) in a case."""
CPU = torch.device("cpu")
_T = TypeVar("_T")


def run(
    implementation: Implementation, *, breadth: CaseSelection = FEW, dtypes: tuple[str, ...] = ()
) -> list[CheckOutcome]:
    """Run every check in every case, as `stream` does, and return the outcomes."""
    outcomes: list[CheckOutcome] = []
    stream(implementation, outcomes.append, breadth=breadth, dtypes=dtypes)
    return outcomes


def stream(
    implementation: Implementation,
    report: Callable[[CheckOutcome], object],
    *,
    breadth: CaseSelection = FEW,
    dtypes: tuple[str, ...] = (),
    begin: Callable[[str], None] | None = None,
    device: torch.device = CPU,
) -> None:
    """Run every check in every case, and report each outcome as soon as it is known.

    dtypes: the dtypes to try. If empty, all dtypes of the implementation are tried. begin: called with the name of each
    case before it starts. device: device of the tensors; a loader's case always runs on the CPU.

    An exception during a check is a failure of this check, and an exception during attaching is a failure of `attach`.
    If the implementation raises harness.Unsupported, the outcome is a skip. Raises DeviceLostError if the GPU accepts
    no more work.
    """
    wanted = [dtype for dtype in implementation.dtypes if dtype in (dtypes or implementation.dtypes)]
    plan = parity_suite.load_plan(implementation.target)
    lost: list[DeviceLostError] = []

    def tried(case: AnyCase) -> Iterator[CheckOutcome]:
        if lost:  # the search draws on, and repeats a case that failed
            return
        if begin is not None:
            begin(f"{case} {case.dtype}")
        wide, seed, only = breadth.is_wide, breadth.seed, breadth.checks
        for outcome in run_case(implementation, plan, case, device, wide=wide, seed=seed, only=only):
            yield outcome
            try:
                require_device_after(outcome, device)
            except DeviceLostError as error:
                lost.append(error)
                return

    for case in sample.fixed(plan, breadth, wanted):
        if not breadth.is_in_shard(f"{implementation.target} {case} {case.dtype}"):
            continue
        # An Operation's first case also runs `first_call`, with the arguments of the typical case.
        named = [f"{one} {one.dtype}" for one in (case, cast("AnyCase | None", case.first)) if one is not None]
        for outcome in tried(case) if any(map(breadth.includes, named)) else ():
            if breadth.includes(f"{outcome.case} {outcome.dtype}"):
                report(outcome)
        if lost:
            raise lost[0]
    if breadth.drawn:
        from harness.conformance.drawing.search import search  # imports Hypothesis

        search(plan, breadth, wanted, tried, report)
        if lost:
            raise lost[0]


def run_case(
    implementation: Implementation,
    plan: ParitySuite,
    of: AnyCase,
    device: torch.device = CPU,
    *,
    wide: bool = False,
    seed: int = 0,
    only: Sequence[str] = (),
) -> Iterator[CheckOutcome]:
    """Run every check that applies to one case, and yield the outcomes.

    device: device of the tensors; a loader's case always runs on the CPU. wide: True also tries the checks that only
    `check --wide` tries in this case. Except in a brief case (`is_brief`), it also lets checks repeat calls more often.
    seed: decides the random walks, together with the case. only: names of the only checks to run, if any are given.
    """
    runner = CaseRunner(implementation, str(of), of.dtype, {} if of.drawn else sample.settings_of(plan, of))
    wanted = [name for name in plan.checks if all(name in some for some in (only, of.checks) if some)]
    every = {name: checks.every()[name] for name in wanted}
    role = {name: getattr(of, name) for name in ("sampled", "typical", "representative", "minor")}
    role |= {"brief": of.is_brief, "has_first": of.first is not None}
    tried = [name for name, one in every.items() if one.is_tried(wide=wide and not of.stays_brief, **role)]
    wide = wide and not of.is_brief
    if (only or of.checks) and not tried:
        return
    if isinstance(plan, OperationSuite) and isinstance(of, OperationCase):
        yield from _run_operation(runner, plan, of, device, tried, wide)
    elif isinstance(plan, MethodSuite) and isinstance(of, MethodCase):
        yield from _run_method(runner, plan, of, device, tried, wide, seed)
    elif isinstance(plan, LoaderSuite) and isinstance(of, LoaderCase):
        yield from _run_loader(runner, plan, of, tried)


@dataclasses.dataclass(frozen=True)
class CaseRunner:
    """Runs the checks of one case of an implementation. An exception in a check counts as a failure of the
    implementation, except harness.Unsupported, which skips the check.
    """

    implementation: Implementation
    case: str
    """Name of the case."""
    dtype: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Every setting and size of the case."""

    def check(self, name: str, subject: Subject | OperationSubject | LoaderSubject, case: Case) -> CheckOutcome:
        """Run one check and return its outcome. Process-wide settings that the check has changed are restored."""

        def run() -> CheckResult:
            with torch.random.fork_rng(), process_settings.restored():
                process_settings.seed(SEED)
                return checks.every()[name](subject, case)

        found = self.attempt(CheckId(subject.method, name, self.dtype, case.state), run)
        return found if isinstance(found, CheckOutcome) else self._outcome(found)

    def attempt(self, check: CheckId, act: Callable[[], _T]) -> _T | CheckOutcome:
        """Call `act` and return its result. If `act` raises an exception, return the outcome of `check` that reports it."""
        try:
            return act()
        except Unsupported as error:
            result = CheckResult(check=str(check), outcome=Outcome.SKIPPED, detail=f"unsupported: {error}")
            return self._outcome(result, Execution.UNSUPPORTED)
        except Exception as error:  # noqa: BLE001  # an implementation may raise anything: it is a finding about it
            result = CheckResult(check=str(check), outcome=Outcome.FAIL, detail=_raised(error))
            return self._outcome(result, Execution.RAISED, "".join(traceback.format_exception(error)))

    def _outcome(
        self, result: CheckResult, execution: Execution = Execution.COMPLETED, trace: str = ""
    ) -> CheckOutcome:
        it = self.implementation
        return CheckOutcome(
            implementation=it.name, kind=it.kind, target=it.target, dtype=self.dtype, case=self.case, result=result,
            execution=execution, traceback=trace, settings=dict(self.settings),
        )  # fmt: skip


def _run_method(
    runner: CaseRunner,
    plan: MethodSuite,
    of: MethodCase,
    device: torch.device,
    tried: Sequence[str],
    wide: bool,
    seed: int,
) -> Iterator[CheckOutcome]:
    """Run the checks in a case of a Method or of a quantised base, and yield the outcomes.

    tried: names of the checks. Each check runs in the states that it declares.
    """
    attaching = CheckId(plan.method, "attach", of.dtype, "init")
    with process_settings.restored() as disturbed:  # the imports of the first attaching may disturb settings too
        made = runner.attempt(attaching, lambda: attach(runner.implementation, plan, of, device, seed))
    if isinstance(made, CheckOutcome):
        yield made
        return
    subject, case = made
    subject.disturbed += disturbed
    if not of.sampled and of.dtype in ("float64", "float32") and (wide or of.typical):  # 16 bits would overflow
        case = dataclasses.replace(case, other_settings=sample.other_settings(plan, of))
    case = case if wide else dataclasses.replace(case, walks=0, is_brief=not of.typical)
    is_last_only = of.sampled or (of.minor and not wide)
    for state in plan.states:
        in_state = dataclasses.replace(case, state=state)
        if state == "warm":
            failure = runner.attempt(attaching, lambda: warm(subject.added(), case.generator(salt=1)))
            if failure is not None:
                yield failure
                return
        for name in tried:
            states = checks.every()[name].states
            if is_last_only and states is States.ALL and state != plan.states[-1]:
                continue
            if states.include(state, plan.states):
                yield runner.check(name, subject, in_state)


def _run_operation(
    runner: CaseRunner, plan: OperationSuite, of: OperationCase, device: torch.device, tried: Sequence[str], wide: bool
) -> Iterator[CheckOutcome]:
    subject, case = call(runner.implementation, plan, of, device)
    case = case if wide else dataclasses.replace(case, walks=0, is_brief=not of.typical)
    early = dict[str, CheckOutcome]()
    for name in [name for name in tried if checks.every()[name].calls_first]:
        first = cast("OperationCase", of.first)
        settings = sample.settings_of(plan, first)
        before = dataclasses.replace(runner, case=str(first), dtype=first.dtype, settings=settings)
        early[name] = before.check(name, *call(runner.implementation, plan, first, device))
    for name in tried:
        yield early[name] if name in early else runner.check(name, subject, case)


def _run_loader(runner: CaseRunner, plan: LoaderSuite, of: LoaderCase, tried: Sequence[str]) -> Iterator[CheckOutcome]:
    subject = LoaderSubject(runner.implementation, of.dtype, corpus_adapter(of.adapter))
    case = Case("loaded", seed=SEED, factors=plan.factors())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny, and threads would wait for each other
    try:
        for name in tried:
            yield runner.check(name, subject, case)
    finally:
        torch.set_num_threads(threads)


def call(
    implementation: Implementation, plan: OperationSuite, of: OperationCase, device: torch.device = CPU
) -> tuple[OperationSubject, Case]:
    """Draw the arguments for an Operation's case. Return the subject with these arguments on `device`, and the Case."""
    operation = operations.every()[plan.operation]

    def draw(seed: int) -> Arguments:
        dtype = DTYPES[of.dtype]
        given = operation.arguments(dtype, torch.Generator().manual_seed(seed), **of.values)
        varied = {name: vary(given[name].double(), of.magnitude, dtype).to(dtype) for name in operation.inputs}
        return moved(given | varied if of.magnitude != "normal" else given, device)

    subject = OperationSubject(operation, implementation, of.dtype, draw(SEED), lambda: draw(SEED + 1))
    case = Case(
        "call", seed=SEED, walks=0 if of.sampled else WALKS, is_drawn=of.drawn, magnitude=of.magnitude,
        factors=plan.factors(), long_sums=long_sums.of_operation(plan, of, subject.arguments), dtype=of.dtype,
    )  # fmt: skip
    return subject, case


def attach(
    implementation: Implementation,
    plan: MethodSuite,
    of: MethodCase,
    device: torch.device = CPU,
    seed: int = 0,
) -> tuple[Subject, Case]:
    """Attach an implementation to a fresh parity model on `device`. Return the subject and its Case in state `init`.

    seed: decides the random walks, together with the case.
    """
    method = plan.method

    def built(shape: parity_suite.CaseShape) -> ParityModel:
        return ParityModel(of.kind, shape, DTYPES[of.dtype], SEED, of.model, of.weights).eval().to(device)

    pristine = built(of.shape)
    # One weight and one config: one reference, shared by every subject made here.
    cache: dict[tuple[str, str], ReferenceLayer] = {}

    @functools.cache  # quantising a weight takes longer than attaching
    def codes_of(path: str) -> ExpectedCodes:
        layer: Any = pristine.get_submodule(path)
        return ExpectedCodes.of(layer.weight, bias=layer.bias)

    def fresh(
        *,
        seed: int | torch.Generator = SEED,
        square: bool = False,
        model: nn.Module | None = None,
        adapter: str = "",
        **changed: Any,
    ) -> Subject:
        given = model is not None
        name = adapter or method
        attaching = sibling(implementation, adapter, of.dtype, device.type) if adapter else implementation
        if model is None:
            model = built(of.shape.square()) if square else copied(pristine)
        resolved = configure(name, of.config | changed, drops_unknown=bool(adapter))
        if hasattr(resolved, "targets") and isinstance(model, ParityModel):
            resolved = dataclasses.replace(resolved, targets=model.targets)
        bases = _adaptable(model, resolved)
        packed: dict[str, PackedLayer] = {}
        expected: dict[str, ExpectedCodes] = {}
        unpacked = copied(model) if plan.base else None
        if plan.base:
            linear = {path: one for path, one in bases.items() if isinstance(one, nn.Linear)}
            usual = not (given or square)
            expected = {
                path: codes_of(path) if usual else ExpectedCodes.of(one.weight, bias=one.bias)
                for path, one in linear.items()
            }
            packed = pack(implementation, model, bases, DTYPES[of.dtype])
            bases = _adaptable(model, resolved)
        original, own = Original.of(model), list(model.parameters())
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        if plan.base and not adapter:
            adapted = attach_reference(name, model, resolved, None, generator)
        else:
            adapted = attaching(model, resolved, generator)
        # Other configs or weights need another reference, and an implementation may pack its base differently each time.
        shared = {} if changed or square or given or plan.base else cache
        return Subject(
            name, resolved, of.dtype, model, adapted, bases, own, original, packed, expected,
            unpacked=unpacked, reference_cache=shared,
        )  # fmt: skip

    subject = fresh()
    run_model, forward = whole(subject.model)
    original = subject.original.model
    assert original is not None  # noqa: S101  # a parity model is small enough to be copied
    is_brief = of.sampled and of.shape.tokens > 1
    case = Case(
        "init", tokens=of.shape.tokens, magnitude=of.magnitude, seed=SEED, run_model=run_model,
        base_output=whole(original)[0](), is_drawn=of.drawn, walks=0 if is_brief else WALKS, is_brief=is_brief,
        walk_seed=seed + zlib.crc32(f"{plan.method} {of} {of.dtype}".encode()), forward=forward,
        forward_of=lambda model: whole(model)[1], attach_fresh=fresh, weights=of.weights, factors=plan.factors(),
        long_sums=long_sums.of_layers(plan, of, pristine), dtype=of.dtype,
    )  # fmt: skip
    return subject, case


def _adaptable(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    if hasattr(config, "targets") and isinstance(model, ParityModel):
        return {name: model.get_submodule(name) for name in model.targets}
    return adaptable_layers(model, config)


def require_device(device: torch.device) -> None:
    """Raise DeviceLostError if the GPU accepts no more work from this process, as after an illegal memory access.

    If `device` is a CPU, do nothing.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(f"the GPU accepts no more work of this process: {error}") from error


def require_device_after(outcome: CheckOutcome, device: torch.device) -> None:
    """Call `require_device` if the check of this outcome ended with an exception."""
    if outcome.execution is Execution.RAISED:
        require_device(device)


def _raised(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
    return "; ".join([f"raised {type(error).__name__}: {error} ({where})", *getattr(error, "__notes__", [])])
