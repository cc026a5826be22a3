"""The reference computes what a judgement needs, and only once: the number of its calls, not their duration."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance import checks, operations, parity_suite
from harness.conformance.adapter_files import reference_logits
from harness.conformance.adapter_files.reference_logits import WeightedAdapterFile
from harness.conformance.adapter_files.subject import LoaderSubject, corpus_adapter
from harness.conformance.case import Case
from harness.conformance.comparison import distances
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.execution import suite_run
from harness.conformance.operation import OperationSubject
from harness.conformance.parity_suite import CaseShape, MethodCase, OperationCase
from harness.conformance.subject import Subject, warm
from harness.methods.registry import Implementation, discover
from harness.methods.spec import Adapted
from harness.records.record import CheckResult, Outcome
from reference import lora
from support.processes import PATIENCE_S

PATHS = 2
"""Number of adapted layers of a ParityModel."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the forward passes of the reference's LoRA layer."""
    counted: Counter[str] = Counter()
    forward = lora.LoraLinear.forward

    def counting(self: lora.LoraLinear, x: Tensor) -> Tensor:
        counted["forward"] += 1
        return forward(self, x)

    monkeypatch.setattr(lora.LoraLinear, "forward", counting)
    return counted


def warm_lora(attach: Callable[..., Adapted] | None = None, **config: Any) -> tuple[Subject, Case]:
    """Return our own kernel for LoRA, or another implementation, with random tensors."""
    fused = discover(["fused"]).find("method", "lora", "fused")
    one = fused if attach is None else Implementation("mine", "method", "lora", attach)
    shape = CaseShape.model_validate({"tokens": 5, "in": 16, "out": 12})
    of = MethodCase({"rank": 3, "alpha": 8, **config}, "linear", shape, "float32")
    plan = parity_suite.load("lora")
    subject, case = suite_run.attach(one, plan, of)
    warm(subject.added(), case.generator(salt=1))
    return subject, replace(case, state="warm")


def run(name: str, subject: Subject | OperationSubject, case: Case) -> CheckResult:
    return checks.every()[name](subject, case)


def test_a_right_merge_needs_one_output_of_each_reference(calls: Counter[str]) -> None:
    assert run("merge", *warm_lora()).outcome is Outcome.PASS
    # The adapter and half of it, in float64. The reference in float32 is merged, so its layer is a plain one.
    assert calls["forward"] == 2 * PATHS


def test_the_inputs_of_merged_layers_are_not_those_of_the_reference() -> None:
    """A layer that overwrites its input is wrong at its next call, and no draw of the reference may excuse it."""

    def attach(model: Any, config: Any, generator: torch.Generator) -> Adapted:
        adapted = lora.attach(model, config, generator)
        for layer in adapted.layers.values():
            layer.register_forward_hook(lambda _, args, y: args[0].mul_(1 + 1e-3) is None or y)
        return adapted

    found = run("merge", *warm_lora(attach))
    assert found.outcome is Outcome.FAIL
    assert found.error is not None


def test_dropout_is_found_without_gradients_of_the_reference(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Counter[str]()
    own = torch.Tensor.backward

    def counting(self: Tensor, *args: Any, **kwargs: Any) -> None:
        backward["passes"] += 1
        own(self, *args, **kwargs)

    subject, case = warm_lora(dropout=0.25)
    monkeypatch.setattr(torch.Tensor, "backward", counting)
    assert run("dropout", subject, case).outcome is Outcome.PASS
    assert backward["passes"] < calls["forward"] / 2


def counted_operation(function: Callable[..., Any]) -> tuple[OperationSubject, Case, Counter[str]]:
    """Return `function` as an implementation of nf4_linear in bfloat16, and the number of calls of the reference."""
    one = Implementation("mine", "operation", "nf4_linear", function)
    of = OperationCase({"shape": [8, 64], "rows": [3]}, "bfloat16")
    subject, case = suite_run.call(one, parity_suite.load_operation("nf4_linear"), of)
    counted: Counter[str] = Counter()
    own = subject.operation.reference

    def counting(**given: Any) -> object:
        counted["calls"] += 1
        return own(**given)

    return replace(subject, operation=replace(subject.operation, reference=counting)), case, counted


OPERATION_CHECKS = ("outputs", "rounded_once", "backward", "overlap")


def test_checks_of_an_operation_share_what_the_reference_computes() -> None:
    subject, case, counted = counted_operation(operations.every()["nf4_linear"].reference)
    assert {run(name, subject, case).outcome for name in OPERATION_CHECKS} <= {Outcome.PASS, Outcome.SKIPPED}
    # Outputs and gradients, in float64 and in bfloat16, for the arguments of the case and for other ones.
    assert counted["calls"] == 2 * 2 * 2


def test_an_implementation_that_spoils_its_arguments_spoils_no_shared_result() -> None:
    right = operations.every()["nf4_linear"].reference

    def spoils(**given: Any) -> object:
        y = right(**given)
        for tensor in given.values():
            if isinstance(tensor, Tensor):
                tensor.detach().zero_()
        return y.detach().clone() if not y.requires_grad else y

    subject, case, _ = counted_operation(spoils)
    for _ in range(2):
        assert run("outputs", subject, case).outcome is Outcome.PASS
        assert run("arguments", subject, case).outcome is Outcome.FAIL


def test_other_outputs_are_judged_anew() -> None:
    """Only outputs that equal earlier ones in every bit are not judged again."""
    right, calls = operations.every()["nf4_linear"].reference, Counter[str]()

    def wrong_at_last(**given: Any) -> object:
        calls["calls"] += 1
        return right(**given) * (1 if calls["calls"] < 3 else 1.1)  # the check calls it twice

    subject, case, _ = counted_operation(wrong_at_last)
    assert [run("outputs", subject, case).outcome for _ in range(2)] == [Outcome.PASS, Outcome.FAIL]


class Draws:
    """Draws of a reference that is right, and their number."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.made = truth, 0

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for _ in range(40):
            self.made += 1
            yield {"y": self.truth * (1 + 1e-7)}


def test_the_distance_of_a_subject_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: Counter[int] = Counter()
    own = distances._Scaled.distance_of

    def counting(self: distances._Scaled, value: Tensor) -> distances.Distance:
        computed[id(value)] += 1
        return own(self, value)

    monkeypatch.setattr(distances._Scaled, "distance_of", counting)
    truth = torch.arange(1.0, 7.0, dtype=torch.float64)
    wrong, draws = truth * (1 + 4e-6), Draws(truth)
    assert not noise_floor({"y": wrong}, {"y": truth}, draws, "float32").passed
    assert draws.made > 1
    assert computed[id(wrong)] == 1


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 1, 4)])
def test_the_place_of_an_element_is_that_of_torch(shape: tuple[int, ...]) -> None:
    for index in range(math.prod(shape)):
        expected = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape))
        assert distances.place(index, shape) == expected


@pytest.mark.slow
def test_a_sum_of_adapters_is_combined_once_although_many_draws_judge_it(monkeypatch: pytest.MonkeyPatch) -> None:
    combined: Counter[int] = Counter()
    own = reference_logits.combine

    def counting(model: Any, adapters: Any) -> None:
        combined["sums"] += 1
        own(model, adapters)

    monkeypatch.setattr(reference_logits, "combine", counting)
    adapter = corpus_adapter("plain")
    subject = LoaderSubject(lambda *_: None, "float32", adapter)  # type: ignore[arg-type, return-value]
    wrong = [max(adapter.logits, key=len).float() * 1.001]
    assert not subject.compare({"sum": wrong}, {"sum": [WeightedAdapterFile(adapter.folder)]}).passed
    assert combined["sums"] == 2  # in float64 and in float32


@pytest.mark.e2e
def test_poisoned_memory_needs_no_compiler() -> None:
    code = (
        "import sys; from harness.conformance.poisoned_memory import poisoned_memory; import torch\n"
        "with poisoned_memory():\n"
        "    assert torch.empty(3).isnan().all() and torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "assert not torch.are_deterministic_algorithms_enabled()\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    root = Path(checks.__file__).parents[3]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert found.stdout.strip() == "[]"
