"""Programs that the check `calls` and the noise of the reference must let pass, and programs that they must not."""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance import operations, parity_suite, self_test
from harness.conformance.comparison.call_forms import LONG_RUN, REPEATS
from harness.conformance.comparison.distant_weights import on_distant_weights
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.layer_comparison import observe_with_reference
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.execution import suite_run
from harness.conformance.faults.call_histories import overwrites_the_output_of_its_last_call
from harness.conformance.faults.patched_copy import PatchedCopy
from harness.conformance.parity_suite import CaseShape, MethodCase, OperationCase
from harness.conformance.subject import warm
from harness.methods.registry import DTYPES, Implementation
from harness.records.record import CheckResult, Outcome
from reference import lora

pytestmark = pytest.mark.slow

SHAPE = CaseShape.model_validate({"tokens": 9, "in": 24, "out": 40})


def method_case(rank: int = 3, shape: CaseShape = SHAPE, dtype: Any = "float32", **sizes: Any) -> MethodCase:
    return MethodCase({"rank": rank}, "linear", shape, dtype, sampled=True, **sizes)


def results(mine: Implementation, case: MethodCase | OperationCase, *checks: str) -> list[CheckResult]:
    """Run these checks in one case and return the results."""
    plan = parity_suite.load_plan(mine.target).model_copy(update={"checks": list(checks)})
    return [one.result for one in suite_run.run_case(mine, plan, case, wide=True)]


def fused(method: str) -> Implementation:
    attach = importlib.import_module(f"harness.methods.implementations.fused.methods.{method}").attach
    return Implementation("mine", "method", method, attach, dtypes=DTYPES)


def with_layers(kind: type[lora.LoraLinear]) -> Implementation:
    """Return LoRA's reference with layers of this class."""

    def attach(model: Any, config: Any, generator: Any) -> Any:
        adapted = lora.attach(model, config, generator)
        for layer in adapted.layers.values():
            layer.__class__ = kind
        return adapted

    return Implementation("mine", "method", "lora", attach, dtypes=DTYPES)


def with_output(change: Callable[[Tensor], Tensor]) -> Implementation:
    """Return LoRA's reference with `change` applied to the output of each layer."""

    class Changed(lora.LoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            return change(super().forward(x))

    return with_layers(Changed)


class _SavesItsOutput(torch.autograd.Function):
    """Passes x on, and keeps the output for the backward pass, as a sigmoid does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * (y == y)


class _ForgetsItsOutput(_SavesItsOutput):
    """Keeps the output where autograd does not notice that it changes. The gradient is wrong then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        ctx.y, ctx.sum = y.detach(), float(y.detach().sum())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * (float(ctx.y.sum()) == ctx.sum)


def test_layers_whose_train_returns_nothing_pass() -> None:
    class Silent(lora.LoraLinear):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]  # as loralib's
            super().train(mode)

    (found,) = results(with_layers(Silent), method_case(), "calls")
    assert found.outcome is Outcome.PASS, found


def test_a_state_that_an_earlier_call_in_training_leaves_behind_is_found() -> None:
    class Stops(lora.LoraLinear):
        """Drops nothing any more after an empty batch in training, as an expert may get it."""

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.training and not len(x):
                self.dropout = torch.nn.Identity()
            return y

    def attach(model: Any, config: Any, generator: Any) -> Any:
        adapted = with_layers(Stops)(model, config, generator)
        for layer in adapted.layers.values():
            layer.eval()  # as the model is: the layers of some libraries adopt its mode
        return adapted

    mine = Implementation("mine", "method", "lora", attach, dtypes=DTYPES)
    case = replace(method_case(), config={"rank": 3, "dropout": 0.25})
    (found,) = results(mine, case, "dropout")
    assert found.outcome is Outcome.FAIL
    assert "first after calls of other sizes: 64 of 64 outputs fit neither" in found.detail


def test_a_layer_whose_backward_pass_needs_the_output_passes() -> None:
    (result,) = results(with_output(_SavesItsOutput.apply), method_case(), "calls")
    assert result.outcome is Outcome.PASS, result


def test_a_wrong_gradient_after_the_output_changed_in_place_is_found() -> None:
    (result,) = results(with_output(_ForgetsItsOutput.apply), method_case(), "calls")
    assert result.outcome is Outcome.FAIL
    assert "an output that is changed in place" in result.tensor or "overwritten" in result.tensor


@pytest.mark.parametrize("target", ["lora", "dora"])
def test_an_output_that_the_next_call_overwrites_is_found(target: str) -> None:
    copy = PatchedCopy(self_test.source_module(target))
    overwrites_the_output_of_its_last_call.spoil(copy)
    (result,) = results(self_test.implementation(target, copy), method_case(), "calls")
    assert result.outcome is Outcome.FAIL
    assert "under no_grad" in result.tensor
    assert "before a later call: y" in result.tensor


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_few_digits_may_be_added_up_token_by_token(dtype: str) -> None:
    """Each of four additions of subnormal numbers rounds, which one call with four tokens does not."""
    (result,) = results(fused("dora"), method_case(8, dtype=dtype, magnitude="tiny"), "calls")
    assert result.outcome is Outcome.PASS, result


def test_the_errors_of_the_float64_reference_accuse_nobody() -> None:
    """DoRA's reference subtracts W0 x from (1 - g) W0 x. Where g is 0.003, it loses 8 bits in float64, too."""
    every = results(fused("dora"), method_case(8, dtype="float64", weights="large"), "forward", "gradient", "calls")
    assert [one for one in every if one.outcome is not Outcome.PASS] == []


def test_one_number_with_an_unlucky_error_fails_nobody() -> None:
    """With rank 1 and one token, the gradient of A is one number times x. Of 600 such gradients, 8 draws refuse 3."""
    case = method_case(1, CaseShape.model_validate({"tokens": 1, "in": 260, "out": 270}), magnitude="small")
    subject, of = suite_run.attach(fused("dora"), parity_suite.load("dora"), case)
    warm(subject.added(), of.generator(salt=1))
    for seed in (160, 190, 276, *range(20)):
        for path, layer in subject.adapted.layers.items():
            generator = torch.Generator().manual_seed(seed)
            x, dy = inputs(subject.original_base(path), 1, torch.float32, generator, "small")
            seen = observe_with_reference(subject, path, layer, x, dy, training=True)
            assert noise_floor(*seen, "float32").passed, (seed, path)


def test_sums_over_gaps_in_memory_may_round_as_the_reference_does_there() -> None:
    """With gaps between its terms, torch adds up a sum of 16,000 terms one by one. Without gaps, it adds up blocks."""
    right = operations.every()["dora_linear"].reference
    mine = Implementation("mine", "operation", "dora_linear", right, dtypes=DTYPES)
    case = OperationCase({"shape": [8, 16000], "rows": [1], "rank": 130, "scaling": 0.25}, "float32", sampled=True)
    (result,) = results(mine, case, "layouts")
    assert result.outcome is Outcome.PASS, result


def test_an_output_of_one_element_may_have_any_stride() -> None:
    right = operations.every()["galore8bit_step"].reference

    def step(**given: Any) -> tuple[Tensor, ...]:
        return tuple(t.repeat_interleave(2)[::2] if t.shape == (1,) else t for t in right(**given))

    mine = Implementation("mine", "operation", "galore8bit_step", step, dtypes=DTYPES)
    (result,) = results(mine, OperationCase({"shape": [64, 64], "rank": 3}, "float32"), "layouts")
    assert result.outcome is Outcome.PASS, result


@pytest.mark.parametrize("is_copied", [False, True])
def test_an_argument_that_is_returned_unchanged_is_no_memory_of_an_output(is_copied: bool) -> None:
    module = importlib.import_module("harness.conformance.operations.lorafa_step")

    def step(**given: Any) -> tuple[Any, ...]:
        outputs = list(module.reference(**given))
        for index, A in ((0, given["As"][0]), (4, given["As"][1])):
            outputs[index] = A.detach().clone() if is_copied else A
        return tuple(outputs)

    mine = Implementation("returns-a", "operation", "lorafa_step", step, DTYPES)
    case = OperationCase({"shape": [12, 20], "ranks": [2, 3]}, "float32")
    (result,) = results(mine, case, "calls")
    assert result.outcome is Outcome.PASS, result


def test_random_cases_are_not_called_a_thousand_times_and_large_ones_not_a_hundred_times() -> None:
    def calls(case: MethodCase) -> int:
        count = 0

        class Counted(lora.LoraLinear):
            def forward(self, x: Tensor) -> Tensor:
                nonlocal count
                count += 1
                return super().forward(x)

        assert [one.outcome for one in results(with_layers(Counted), case, "calls")] == [Outcome.PASS]
        return count

    large = CaseShape.model_validate({"tokens": 1, "in": 200, "out": 150})
    example = calls(replace(method_case(), sampled=False))
    assert example > LONG_RUN > calls(replace(method_case(), sampled=False, drawn=True)) > REPEATS
    assert calls(replace(method_case(shape=large), sampled=False)) > LONG_RUN
    assert calls(replace(method_case(shape=large), sampled=False, drawn=True)) < example - LONG_RUN - REPEATS


def test_an_exception_names_the_layer_and_the_form_that_raised_it() -> None:
    class NotUnderAutocast(lora.LoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("not this dtype")
            return super().forward(x)

    class NotCopied(lora.LoraLinear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot be copied")

    for kind, raised in (
        (NotUnderAutocast, "RuntimeError: not this dtype"),
        (NotCopied, "TypeError: cannot be copied"),
    ):
        (result,) = results(with_layers(kind), method_case(), "calls")
        assert result.outcome is Outcome.FAIL
        assert raised in result.detail
        assert "in the form `first " in result.detail
    assert "in the form `first by a deep copy`" in result.detail


def _wrapped(gate_up: Tensor, **others: Any) -> Tensor:
    """The block of experts, but with offsets in 32 bits, as in Liger-Kernel#1296."""
    reached = [k if k * gate_up.stride(0) < 2**31 else 0 for k in range(len(gate_up))]
    return operations.every()["lora_experts"].reference(gate_up=gate_up[reached], **others)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_of_experts_that_wrap_at_32_bits_are_found_in_little_memory(dtype: Any, transposed: bool) -> None:
    plan, peak = parity_suite.load_operation("lora_experts"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    drawn = OperationCase({"shape": [16, 12], "experts": 3, "rank": 2, "transposed": transposed}, dtype)
    for function, passes in ((operations.every()["lora_experts"].reference, True), (_wrapped, False)):
        subject, case = suite_run.call(Implementation("mine", "operation", "lora_experts", function), plan, drawn)
        (judgement,) = on_distant_weights(subject, case)
        assert judgement.passed is passes
        assert passes or judgement.tensor == "on stacked weights far apart in memory: y"
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000
    )  # KiB; the stacks have 8 GiB of addresses


def test_stacks_that_need_no_large_offset_are_left_alone() -> None:
    plan, reference = parity_suite.load_operation("lora_experts"), operations.every()["lora_experts"].reference
    for experts, dtype in ((2, "bfloat16"), (3, "float32")):
        drawn = OperationCase({"shape": [16, 12], "experts": experts, "rank": 2}, dtype)  # type: ignore[arg-type]
        subject, case = suite_run.call(Implementation("mine", "operation", "lora_experts", reference), plan, drawn)
        assert list(on_distant_weights(subject, case)) == []


def test_a_layer_that_returns_no_tensor_is_told_what_it_returned() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x, None

    with pytest.raises(TypeError, match="should return a tensor; Pair returned tuple"):
        observe(Pair(), {}, torch.ones(2, 3), torch.ones(2, 3))
