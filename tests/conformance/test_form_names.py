"""`explain calls` names every form in which the check `calls` tries an implementation."""

from __future__ import annotations

import re
from typing import Any

import pytest

from harness.cli import topics
from harness.conformance import parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.checks import calls
from harness.conformance.comparison import call_forms, operation_call, operation_forms
from harness.conformance.drawing import sample
from harness.conformance.execution import suite_run
from harness.methods.registry import Implementation, discover


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the name of each form that is judged."""
    found: list[str] = []

    def noted(at: int, function: Any) -> Any:
        def note(*given: Any) -> Any:
            found.append(str(given[at]))
            return function(*given)

        return note

    monkeypatch.setattr(calls, "_named", noted(1, calls._named))
    monkeypatch.setattr(operation_forms, "prefix_tensor", noted(0, operation_forms.prefix_tensor))
    monkeypatch.setattr(operation_call, "judge_form", noted(0, operation_call.judge_form))
    return found


def _reference(kind: Any, target: str) -> Implementation:
    return discover(only=["reference"]).find(kind, target, "reference")


def _expected(kinds: list[str]) -> str:
    names = [re.escape(name).replace(r"\{\}", ".+") for kind in kinds for name in calls.forms()[kind]]
    return "|".join(names)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kind"), [("lora", "method"), ("lora_linear", "operation")])
def test_every_form_has_its_name_in_explain(target: str, kind: str, tried: list[str]) -> None:
    implementation, plan = _reference(kind, target), parity_suite.load_plan(target)
    first = next(iter(sample.fixed(plan, FEW, ["float32"])))
    if kind == "method":
        subject, case = suite_run.attach(implementation, plan, first)  # type: ignore[arg-type]
    else:
        subject, case = suite_run.call(implementation, plan, first)  # type: ignore[arg-type,assignment]
    calls.check_calls(subject, case)
    described = topics.explain("calls")
    of_layers, of_operations = ([k for k in calls.forms() if ("layer" in k) is layer] for layer in (True, False))
    alone = _expected(of_layers if kind == "method" else of_operations)
    in_layouts = f"({_expected([of_layers[2]])}) ({_expected([of_layers[0]])})"
    assert len(tried) > 15
    assert [form for form in tried if not re.fullmatch(f"{alone}|{in_layouts}", form)] == []
    for names in calls.forms().values():
        assert all(name.replace("{}", "NAME") in described for name in names)
    # and no name is listed that is never tried
    never = [n for k in (of_layers if kind == "method" else of_operations) for n in calls.forms()[k]]
    never = [n for n in never if not any(re.fullmatch(re.escape(n).replace(r"\{\}", ".+"), form) for form in tried)]
    assert set(never) <= {"channels_last", *_NOT_OF_THIS_CASE}


_NOT_OF_THIS_CASE = (
    "with only {} in use",  # of an operation with several outputs
    "with an input that is changed later",  # which torch refuses
    f"backward {call_forms.REPEATS} times",  # if the results differ
    "image by image without a batch dimension",  # of a convolution
    "with token numbers in int32", "under no_grad in training mode token by token",  # of an embedding, of sequences
    "with a tiny {}", "under no_grad in training mode", "under no_grad in training mode before a later call",  # no dropout
    "with tensors that are changed before backward", "with {} changed before backward",  # which torch refuses
    "with outputs that are changed in place",  # likewise
    "outputs that are views of larger tensors",  # of an operation without gradients
    "before other gradients", "with a graph that nothing needs",  # only of a failure
    "still in memory after the program dropped it",  # likewise
    "on stacked weights far apart in memory",  # of experts, in 16 bits
    "with a tensor that is several items of {}",  # of an operation with lists
    "by a copy in {}", "by a pickled copy", "by torch.func",  # where the layer allows it
)  # fmt: skip
