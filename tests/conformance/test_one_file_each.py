"""A check, a planted fault and an Operation are each one new file: no list names them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from harness.conformance import checks, faults, operations, parity_suite, self_test
from harness.conformance.execution import suite_run
from harness.conformance.parity_suite import OperationCase, OperationSuite
from harness.methods.registry import Implementation
from harness.records.check import Outcome

CHECK = '''
"""Weights that are numbers."""
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import from_problems

@check(States.INIT)
def check_numbers(subject, case):
    """Every trainable tensor is finite."""
    odd = [name for name, t in subject.adapted.tensors().items() if not bool(t.isfinite().all())]
    return from_problems(subject, case, "numbers", odd)
'''
FAULTS = '''
"""Faults of a Method, and one of every Method with the check."""
from harness.conformance.faults import planted, planted_in_methods

@planted("lora", "numbers", values={"rank": 3, "alpha": 8.0})
def starts_with_nan(copy):
    copy.replace_line("A.uniform_(-bound, bound, generator=generator)", "A.fill_(float('nan'))", file="lora_start")

@planted_in_methods("numbers", adds_layers=None)
def ends_with_infinity(copy):
    copy.change_adapted(lambda adapted: [t.data.fill_(float("inf")) for t in adapted.tensors().values()])
'''
OPERATION = '''
"""twofold: twice a tensor."""
from harness.conformance.operation import Operation, draw

def arguments(dtype, generator, *, shape):
    return {"x": draw(generator, dtype, *shape)}

def reference(x):
    return 2 * x

OPERATION = Operation("twofold", ("y",), arguments, reference, differentiable=("x",))
'''

AddFile = Callable[[ModuleType, str, str], None]


@pytest.fixture
def add_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddFile]:
    """Return a function that adds a file to a package: (package, name, source)."""
    packages = (checks, faults, operations)

    def add(package: ModuleType, name: str, source: str) -> None:
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        package.every.cache_clear()
        self_test._plan.cache_clear()

    there = set(sys.modules)
    yield add
    monkeypatch.undo()
    for name in set(sys.modules) - there:
        if name.startswith("harness.conformance."):
            del sys.modules[name]
    self_test._plan.cache_clear()
    for package in packages:
        package.every.cache_clear()


@pytest.mark.slow
def test_a_check_and_its_faults_are_found(add_file: AddFile, monkeypatch: pytest.MonkeyPatch) -> None:
    add_file(checks, "numbers", CHECK)
    load = parity_suite.load_plan

    def with_numbers(name: str) -> parity_suite.ParitySuite:
        plan = load(name)
        more = ["numbers"] if name in ("lora", "vera") else []
        return plan.model_copy(update={"checks": [*plan.checks[:5], *more]})

    assert checks.every()["numbers"].states is checks.States.INIT
    assert checks.docstrings()["numbers"] == "Every trainable tensor is finite."
    monkeypatch.setattr(parity_suite, "load_plan", with_numbers)
    add_file(faults, "numbers", FAULTS)
    mine = [fault for fault in faults.every() if "numbers" in fault.expected]
    assert [(fault.target, fault.name) for fault in mine] == [
        ("lora", "starts_with_nan"), ("lora", "ends_with_infinity"), ("vera", "ends_with_infinity"),
    ]  # fmt: skip
    report = self_test.run(mine)
    assert report.caught == len(mine)
    assert report.wrong == []


def test_an_operation_is_found_and_judged(add_file: AddFile) -> None:
    add_file(operations, "twofold", OPERATION)
    case = OperationCase({"shape": [3, 5]}, "float32")
    plan = OperationSuite.model_validate(
        {"operation": "twofold", "checks": ["outputs", "backward"], "cases": [case.values], "dtypes": ["float32"]}
    )

    def outcomes(factor: float) -> list[Outcome]:
        it = Implementation("mine", "operation", "twofold", lambda x: factor * x)
        return [one.result.outcome for one in suite_run.run_case(it, plan, case)]

    assert outcomes(2.0) == [Outcome.PASS, Outcome.PASS]
    assert outcomes(2.5) == [Outcome.FAIL, Outcome.FAIL]
