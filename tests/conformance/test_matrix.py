"""What the verb `check` does with an implementation, case by case."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from harness.conformance import checks, parity_suite
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import exact
from harness.conformance.drawing import sample
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.conformance.subject import DTYPES, warm
from harness.methods.registry import Implementation, discover, implements
from harness.methods.spec import methods
from harness.records.record import Outcome
from reference import lora as reference_lora

SEED = 4


def method(name: str, target: str = "lora") -> Implementation:
    return discover().find("method", target, name)


def failed(tried: list[CheckOutcome]) -> set[str]:
    return {t.check for t in tried if t.status is CheckStatus.FAIL}


def tried_by_default(check: str) -> bool:
    return checks.every()[check].is_tried(wide=False, sampled=False, typical=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> parity_suite.MethodSuite:
    """Let the parity suite of LoRA have one square case: enough for a fault to show."""
    few = {"configs": [{"rank": 3, "alpha": 8}], "shapes": [parity_suite.CaseShape(tokens=9, **{"in": 64, "out": 64})]}
    plan = parity_suite.load("lora").model_copy(update={**few, "dtypes": ["float32"]})
    monkeypatch.setattr(parity_suite, "load", lambda name: plan)
    return plan


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "dtype"),
    # The reference in 16 bits: test_self_test.py, where no check may accuse it.
    [("reference", "float32"), ("reference", "float64"), *(("fused", dtype) for dtype in DTYPES)],
)
def test_the_implementations_of_lora_conform(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parity_suite.load("lora").model_copy(update={"layers": ["linear"]})
    monkeypatch.setattr(parity_suite, "load", lambda _: plan)
    tried = list(suite_run.run(method(name), dtypes=(dtype,)))
    assert failed(tried) == set()
    assert {t.case for t in tried} == {str(case) for case in sample.fixed(plan, FEW, (dtype,))}
    skipped = {"float64": {"model", "trajectory"}, "float32": set[str]()}.get(dtype, {"each_setting"})  # and says why
    usual = {name for name in plan.checks if tried_by_default(name)}
    assert {t.check for t in tried if t.status is CheckStatus.PASS} == usual - skipped


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("target", ["frozen", "full"])
def test_the_baselines_conform(target: str, wide: bool) -> None:
    tried = list(suite_run.run(method("reference", target), breadth=CaseSelection(wide=wide)))
    assert failed(tried) == set()
    expected = {name for name in parity_suite.load(target).checks if wide or tried_by_default(name)}
    assert {t.check for t in tried if t.status is CheckStatus.PASS} == expected


OF_LORA = set(parity_suite.load("lora").checks)


@pytest.mark.slow
@pytest.mark.parametrize("target", [one for one in methods() if not set(parity_suite.load(one).checks) <= OF_LORA])
def test_the_checks_that_lora_does_not_have_pass_the_reference(target: str) -> None:
    own = [name for name in parity_suite.load(target).checks if name not in OF_LORA]
    plan = parity_suite.load(target).model_copy(update={"checks": own})
    passed: set[str] = set()
    dtypes = ["float32", "bfloat16"] if "decoded" in own else ["float32"]
    for case in plan.cases(FEW, dtypes):  # an option such as rank dropout is in some of the cases
        tried = list(suite_run.run_case(method("reference", target), plan, case))
        assert failed(tried) == set()
        passed |= {t.check for t in tried if t.status is CheckStatus.PASS}
        if passed == set(own):
            break
    assert passed == {name for name in own if tried_by_default(name)}


@pytest.mark.parametrize("dtypes", [["float32", "float16"], ["bfloat16"]])
@pytest.mark.parametrize("target", ["lora", "lokr", "pissa", "full", "lora_linear", "adapter_files"])
def test_one_example_of_a_suite_is_typical(target: str, dtypes: list[str]) -> None:
    plan = parity_suite.load_plan(target)
    typical = [case for case in sample.fixed(plan, FEW, dtypes) if case.typical]
    assert [case.dtype for case in typical] == dtypes[:1]
    for case in typical:
        if isinstance(case, parity_suite.MethodCase):
            assert not any(value for name, value in case.config.items() if "dropout" in name)
            assert case.kind == "linear"
            assert case.shape.inputs != case.shape.outputs  # a square layer hides a transposed matrix


@pytest.mark.parametrize("target", ["lora", "qlora", "nf4_quantize"])
def test_other_ways_to_call_are_tried_in_one_example_of_16_and_of_32_bits_and_of_each_kind_of_layer(
    target: str,
) -> None:
    plan = parity_suite.load_plan(target)
    every = list(sample.fixed(plan, FEW, DTYPES))
    tried = [case for case in every if case.typical or case.representative]
    assert len({(case.dtype, getattr(case, "kind", "")) for case in tried}) == len(tried)
    linear = [case.dtype for case in tried if getattr(case, "kind", "linear") == "linear"]
    assert sorted(linear) == ["bfloat16", "float32"]
    assert {getattr(case, "kind", "") for case in tried} == {getattr(case, "kind", "") for case in every}
    one = checks.every()["calls"]
    assert one.is_tried(wide=False, sampled=False, typical=False, representative=True)
    assert not one.is_tried(wide=False, sampled=False, typical=False)


@pytest.mark.parametrize(("target", "switch"), [("nf4_linear", "training"), ("lora_mlp", "dora")])
def test_other_ways_to_call_are_tried_with_both_values_of_an_operations_switch(target: str, switch: str) -> None:
    plan = parity_suite.load_operation(target)
    tried = [case for case in sample.fixed(plan, FEW, DTYPES) if case.typical or case.representative]
    default = sample.factors(plan, DTYPES)[switch].levels[0]
    given = {getattr(case, "values", {}).get(switch, default) for case in tried}
    assert given == {True, False}


def test_some_long_checks_are_tried_in_the_typical_example_alone() -> None:
    every, wide = checks.every(), CaseSelection(wide=True)
    names = [name for name in every if tried_by_default(name) and every[name].only_wide]
    assert sorted(names) == [
        "calls",
        "each_setting",
        "moments",
        "nonfinite",
        "overlap",
        "own_adapters",
        "shared_input",
        "svd",
        "targets",
    ]
    for one in names:
        assert not every[one].is_tried(wide=False, sampled=False, typical=False)
        representative = every[one].is_tried(wide=False, sampled=False, typical=False, representative=True)
        assert representative == (one in ("calls", "overlap"))
    assert every["calls"].is_tried(wide=wide.is_wide, sampled=True, typical=False)


@pytest.mark.parametrize("target", ["lora", "galore", "lora_linear"])
def test_a_minor_example_leaves_out_checks_that_show_nothing_new_there(target: str) -> None:
    plan = parity_suite.load_plan(target)
    reference = discover().find(parity_suite.kind_of(target), target, "reference")
    tried = dict[str, set[str]]()
    for case in sample.fixed(plan, FEW, DTYPES):
        role = next((one for one in ("typical", "representative", "minor", "is_brief") if getattr(case, one)), "")
        if role not in tried:
            tried[role] = {one.check for one in suite_run.run_case(reference, plan, case)}
    assert tried.keys() == {"typical", "representative", "minor", "is_brief"}
    left_out = {"save", "strides", "overlap", "initial", "trajectory"}.intersection(plan.checks)
    assert left_out
    assert left_out <= tried["representative"] & tried["typical"]
    assert not left_out & (tried["minor"] | tried["is_brief"])
    assert {"forward", "merge", "outputs"}.intersection(plan.checks) <= tried["minor"] & tried["is_brief"]
    for name in left_out:
        assert checks.every()[name].is_tried(wide=True, sampled=False, typical=False, minor=True)


@pytest.mark.slow
def test_the_default_finds_an_update_that_is_kept_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(reference_lora.LoraLinear):
        def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                return super().forward(x_TD)
            kept = self.__dict__.setdefault("_kept", self.delta().detach())
            y: torch.Tensor = self.base(x_TD) + x_TD @ kept.T
            return y

    def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
        adapted = method("reference")(model, config, generator)
        for layer in adapted.layers.values():
            layer.__class__ = Kept
        return adapted

    plan = parity_suite.load("lora").model_copy(update={"layers": ["linear"], "checks": ["forward", "calls"]})
    monkeypatch.setattr(parity_suite, "load", lambda _: plan)
    stale = implements("lora", name="stale", dtypes=["float32"])(attach)
    assert {(t.check, t.case) for t in suite_run.run(stale) if t.status is CheckStatus.FAIL} == {
        ("calls", next(str(case) for case in plan.cases(FEW, ["float32"]) if case.typical))
    }


def test_observing_leaves_gradients_and_mode_as_they_were() -> None:
    layer = nn.Linear(4, 3)
    layer.train()
    layer.weight.grad = torch.full((3, 4), 7.0)
    seen = observe(layer, {"W": layer.weight}, torch.ones(2, 4), torch.ones(2, 3))
    assert set(seen) == {"y", "grad x", "grad W"}
    assert torch.equal(seen["grad W"], torch.full((3, 4), 2.0))
    assert torch.equal(layer.weight.grad, torch.full((3, 4), 7.0))
    assert layer.training


@pytest.mark.slow
@pytest.mark.parametrize("state", ["init", "warm"])
def test_checks_leave_the_subject_as_they_found_it(state: str, small: parity_suite.MethodSuite) -> None:
    subject, case = suite_run.attach(method("reference"), small, next(small.cases(FEW)))
    if state == "warm":
        warm(subject.added(), torch.Generator().manual_seed(SEED))
    before = {n: t.clone() for n, t in subject.model.state_dict().items()}
    for name in small.checks:
        checks.every()[name](subject, dataclasses.replace(case, state=state))
        assert exact(subject.model.state_dict(), before).passed, name
        assert all(p.grad is None for p in subject.model.parameters()), name


def test_forward_and_gradient_share_one_pass_within_a_case_only() -> None:
    plan = parity_suite.load("lora")
    subject, case = suite_run.attach(method("reference"), plan, next(plan.cases(FEW)))
    warm(subject.added(), case.generator(salt=1))
    assert checks.every()["forward"](subject, case).outcome is Outcome.PASS
    for layer in subject.adapted.layers.values():
        layer.scaling *= 2
    assert checks.every()["gradient"](subject, dataclasses.replace(case, state="warm")).outcome is Outcome.FAIL


@pytest.mark.slow
def test_tensors_that_cannot_be_listed_are_one_finding_in_each_case(small: parity_suite.MethodSuite) -> None:
    def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
        adapted = method("reference")(model, config, generator)
        adapted.tensors = lambda: 1 / 0
        return adapted

    broken = implements("lora", name="broken", dtypes=["float32"], offers=["nn.Conv1d", "Conv3d"])(attach)
    findings = [t.result for t in suite_run.run(broken) if t.result.check == "lora/attach/float32/init"]
    assert len(findings) == len(list(sample.fixed(small, FEW, ["float32"])))
    assert all("ZeroDivisionError" in f.detail for f in findings if f.outcome is not Outcome.SKIPPED)


@pytest.mark.parametrize(("dtypes", "judged"), [(tuple(DTYPES), "float32"), (("float16",), "float16")])
def test_the_check_that_must_come_first_runs_once_and_in_float32_if_possible(
    dtypes: tuple[str, ...], judged: str
) -> None:
    plan = parity_suite.load_plan("nf4_quantize")
    reference = discover().find("operation", "nf4_quantize", "reference")
    cases = list(sample.fixed(plan, FEW, dtypes))
    (typical,) = [case for case in cases if case.typical]
    assert cases[0].first is not None
    assert all(case.first is None for case in cases[1:])
    (found,) = [one for one in suite_run.run_case(reference, plan, cases[0]) if one.check == "first_call"]
    assert (found.case, found.dtype) == (str(typical), judged)
