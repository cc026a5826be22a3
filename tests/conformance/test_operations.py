"""What `check` says of right and of wrong implementations of the Operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.conformance import checks, operations, parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.comparison.call_forms import LONG_RUN, REPEATS
from harness.conformance.drawing import sample
from harness.conformance.execution import suite_run
from harness.methods.registry import Implementation
from harness.records.record import Outcome
from reference.operations import fp4, multi_lora, nf4

Function = Callable[..., Any]


def failing(target: str, function: Function, dtype: str = "float32") -> dict[str, list[str]]:
    """Map each check that fails to the cases in which it does."""
    failed: dict[str, list[str]] = {}
    for one in suite_run.run(Implementation("mine", "operation", target, function, dtypes=(dtype,))):
        if one.status.value == "fail":
            failed.setdefault(one.check, []).append(one.case)
    return failed


def failing_examples(target: str, function: Function) -> set[str]:
    """Return the checks that fail in some of the suite's first examples in float32. `failing` tries all cases."""
    mine = Implementation("mine", "operation", target, function, dtypes=("float32",))
    plan = parity_suite.load_plan(target)
    cases = [case for case in sample.fixed(plan, FEW, ["float32"]) if case.typical or case.representative]
    tried = [one for case in cases for one in suite_run.run_case(mine, plan, case)]
    return {one.check for one in tried if one.status.value == "fail"}


def right(target: str) -> Function:
    return operations.every()[target].reference


@pytest.mark.nightly
@pytest.mark.parametrize("target", operations.every())
def test_the_reference_of_every_operation_passes(target: str) -> None:
    assert failing(target, right(target)) == {}


def nan_hidden(target: str, function: Function) -> str:
    """Return what the check `nonfinite` says of an implementation in a case of the suite. Empty if the check passes."""
    plan = parity_suite.load_operation(target)
    case = next(plan.cases(FEW, ["float32"]))
    tried = suite_run.call(Implementation("mine", "operation", target, function, dtypes=("float32",)), plan, case)
    found = checks.every()["nonfinite"](*tried)
    return found.detail if found.outcome is Outcome.FAIL else ""


@pytest.mark.parametrize("target", [n for n in operations.every() if "nonfinite" in parity_suite.load_plan(n).checks])
def test_no_reference_of_an_operation_raises_an_exception_on_a_nan(target: str) -> None:
    assert nan_hidden(target, right(target)) == ""


def test_an_implementation_may_refuse_a_nan_but_not_replace_it() -> None:
    def refusing(**given: Any) -> Any:
        torch.linalg.pinv(given["As"][0])  # raises an exception for a NaN
        return right("lorafa_step")(**given)

    def replacing(**given: Any) -> Any:
        return right("lorafa_step")(**{**given, "As": [A.nan_to_num() for A in given["As"]]})

    assert nan_hidden("lorafa_step", refusing) == ""
    assert "a NaN in As[0] does not reach B0" in nan_hidden("lorafa_step", replacing)


def swapped(packed: torch.Tensor) -> torch.Tensor:
    return packed << 4 | packed >> 4


def changed(target: str, **wrong: Any) -> Function:
    """Return the reference called with other values for some arguments."""

    def call(**given: Any) -> Any:
        return right(target)(**{**given, **{k: v(given[k]) if callable(v) else v for k, v in wrong.items()}})

    return call


def on_output(target: str, index: int, wrong: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    """Return the reference with one of its outputs changed."""

    def call(**given: Any) -> Any:
        outputs = list(operations.every()[target].named(right(target)(**given)).values())
        outputs[index] = wrong(outputs[index])
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    return call


def ties_go_up(W: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    levels, (_, absmax) = nf4.codebook(), nf4.quantize(W, block)
    of_each = absmax.repeat_interleave(block)[: W.numel()]
    scaled = torch.where(of_each == 0, 0.0, W.flatten().float() / of_each)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, right=True).to(torch.uint8)
    return nf4.pack(codes), absmax


def blocks_end_with_rows(packed: Any, absmax: Any, block: int, shape: Any, dtype: Any) -> torch.Tensor:
    """Decode with the absmax of each row's own count of blocks, as if a row were whole blocks."""
    rows, n = torch.Size(shape[:-1]).numel(), shape[-1]
    index = torch.arange(rows)[:, None] * (n // block) + torch.arange(n) // block
    levels = nf4.codebook()[nf4.unpack(packed, rows * n).long()].view(rows, n)
    return (levels * absmax[index.clamp(max=len(absmax) - 1)]).view(shape).to(dtype)


def without_gradient(**given: Any) -> torch.Tensor:
    y: torch.Tensor = right("nf4_linear")(**given)
    return y.detach().requires_grad_(True)


def half_in_bfloat16(x: Any, training: bool, bias: Any, **given: Any) -> torch.Tensor:
    dtype = x.dtype if training else torch.bfloat16
    y: torch.Tensor = right("nf4_linear")(
        x.to(dtype), bias=None if bias is None else bias.to(dtype), training=True, **given
    )
    return y.to(x.dtype)


def in_place(p: Any, **given: Any) -> Any:
    after = right("adamw8bit_step")(p=p, **given)
    p.copy_(after[0])
    return after


def nobody_is_somebody(x: Any, W: Any, As: Any, Bs: Any, scalings: Any, ids: Any) -> torch.Tensor:
    return multi_lora.multi_lora_linear(x, x @ W.T, As, Bs, scalings, ids.clamp(min=0))


def different_every_time(x: Any, **given: Any) -> torch.Tensor:
    return right("multi_lora_linear")(x=x * (1 + torch.rand(())), **given)


FAULTS = {
    "ties go up": ("nf4_quantize", ties_go_up, "outputs"),
    "nibbles are swapped": ("nf4_quantize", on_output("nf4_quantize", 0, swapped), "outputs"),
    "absmax is that of bfloat16": (
        "nf4_quantize", on_output("nf4_quantize", 1, lambda absmax: absmax.bfloat16().float()), "outputs",
    ),
    "the code is one too high": ("fp4_quantize", on_output("fp4_quantize", 0, lambda b: b + 1), "outputs"),
    "nibbles are read the wrong way round": ("fp4_dequantize", changed("fp4_dequantize", packed=swapped), "outputs"),
    "a row is taken for whole blocks": ("nf4_dequantize", blocks_end_with_rows, "outputs"),
    "the mean is not taken off": (
        "double_quantize", on_output("double_quantize", 2, torch.zeros_like), "outputs",
    ),
    "the mean is not added back": ("double_dequantize", changed("double_dequantize", offset=torch.tensor(0.0)), "outputs"),
    "the map is unsigned": ("dynamic_quantize", changed("dynamic_quantize", signed=False), "outputs"),
    "the bias is forgotten": ("nf4_linear", changed("nf4_linear", bias=None), "outputs"),
    "no gradient reaches x": ("nf4_linear", without_gradient, "backward"),
    "evaluating is less exact than training": ("nf4_linear", half_in_bfloat16, "outputs"),
    "a parameter is written in place": ("adamw8bit_step", in_place, "arguments"),
    "decay is not by the learning rate": ("adamw8bit_step", changed("adamw8bit_step", weight_decay=0.0), "outputs"),
    "the step is counted from 0": ("adamw8bit_step", changed("adamw8bit_step", step=lambda t: t + 1), "outputs"),
    "the first moment's code is the next one": (
        "adamw8bit_step",
        on_output("adamw8bit_step", 1, lambda m: (m.int() + 1).clamp(max=255).to(torch.uint8)),
        "output_codes",
    ),
    "paging changes a value": ("paged_adamw", changed("paged_adamw", lr=0.11), "outputs"),
    "alpha is left out": ("galore_step", changed("galore_step", scale=1.0), "outputs"),
    "decay is left out": ("galore_step", changed("galore_step", weight_decay=0.0), "outputs"),
    "the bias correction is a step late": ("galore_step", changed("galore_step", step=lambda t: t + 1), "outputs"),
    "the scaling is left out": (
        "multi_lora_linear", changed("multi_lora_linear", scalings=lambda s: [1.0] * len(s)), "outputs",
    ),
    "a sequence without an adapter gets the first": ("multi_lora_linear", nobody_is_somebody, "outputs"),
    "two calls differ": ("multi_lora_linear", different_every_time, "repeatable"),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_implementation_is_caught_by_the_check_that_names_it(fault: str) -> None:
    target, function, check = FAULTS[fault]
    assert check in failing(target, function)


def in_float64(target: str) -> Function:
    """Return the reference with every floating output cast: all values stay what they are."""

    def call(**given: Any) -> Any:
        outputs = right(target)(**given)
        if isinstance(outputs, torch.Tensor):
            return outputs.double()
        return tuple(t.double() if t.is_floating_point() else t for t in outputs)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("target", operations.every())
def test_a_right_value_of_a_wrong_dtype_fails_and_says_what_it_should_be(target: str) -> None:
    plan = parity_suite.load_operation(target)
    case = list(plan.cases(FEW))[-1]
    mine = Implementation("mine", "operation", target, in_float64(target), dtypes=(case.dtype,))
    (found,) = [one.result for one in suite_run.run_case(mine, plan, case) if one.check == "outputs"]
    assert found.outcome is Outcome.FAIL
    assert found.worst.startswith("dtype torch.float64, should be torch.")
    assert found.tensor


@pytest.mark.slow
def test_a_gradient_of_a_wrong_dtype_fails() -> None:
    """By torch's own switch for it, which lets a leaf take a gradient of any dtype."""

    def wide(x: torch.Tensor, **given: Any) -> Any:
        if x.requires_grad:
            x.grad_dtype = None
        return right("nf4_linear")(x=Widened.apply(x), **given)

    assert "backward" in failing("nf4_linear", wide, "bfloat16")
    assert "backward" not in failing("nf4_linear", wide, "float64")


class Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy.double()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda W: W.flatten(), "shape (8192,), should be (128, 64)"),
        (lambda W: W.to("meta"), "device meta, should be cpu"),
    ],
)
def test_a_wrong_shape_and_a_wrong_device_are_told(wrong: Callable[[torch.Tensor], torch.Tensor], said: str) -> None:
    function = on_output("nf4_dequantize", 0, wrong)
    first = next(
        iter(suite_run.run(Implementation("mine", "operation", "nf4_dequantize", function, dtypes=("float32",))))
    )
    assert (first.result.check, first.result.worst) == ("nf4_dequantize/outputs/float32/call", said)


@pytest.mark.slow
def test_a_dtype_that_is_wrong_for_a_view_only_fails_the_layouts() -> None:
    def wide_if_gapped(absmax: torch.Tensor, **given: Any) -> torch.Tensor:
        W: torch.Tensor = right("nf4_dequantize")(absmax=absmax, **given)
        return W if absmax.is_contiguous() else W.double()

    assert failing("nf4_dequantize", wide_if_gapped).keys() == {"layouts"}


@pytest.mark.slow
def test_only_the_cases_in_which_blocks_cross_rows_show_a_decoder_that_ignores_it() -> None:
    cases = failing("nf4_dequantize", blocks_end_with_rows)["outputs"]
    assert "shape=[128, 64] block=64" not in cases
    assert "shape=[160, 96] block=64" in cases


@pytest.mark.slow
def test_either_zero_of_fp4_is_right() -> None:
    def other_zero(W: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, absmax = fp4.quantize(W, block)
        return fp4.pack(torch.where(codes % 8 == 0, 8 - codes, codes)), absmax

    assert failing("fp4_quantize", other_zero) == {}


@pytest.mark.slow
def test_a_block_of_zeros_may_have_any_code_if_it_comes_back_as_zeros() -> None:
    def marked(absmax_of_zero: float) -> Function:
        def quantize(W: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
            codes, absmax = nf4.quantize(W, block)
            nothing = absmax == 0
            codes = torch.where(nothing.repeat_interleave(block)[: codes.numel()], 3, codes)
            return nf4.pack(codes), torch.where(nothing, absmax_of_zero, absmax)

        return quantize

    assert failing("nf4_quantize", marked(0.0)) == {}
    assert "outputs" in failing("nf4_quantize", marked(1.0))


@pytest.mark.nightly
def test_half_precision_does_not_excuse_what_float32_catches() -> None:
    for dtype in ("bfloat16", "float16"):
        assert "outputs" in failing("nf4_linear", changed("nf4_linear", bias=None), dtype)
        assert "outputs" in failing("galore_step", changed("galore_step", scale=1.0), dtype)


def test_an_operation_that_returns_something_else_is_told_what_it_should_return() -> None:
    results = suite_run.run(
        Implementation("mine", "operation", "nf4_quantize", lambda W, block: W, dtypes=("float32",))
    )
    first = next(iter(results))
    assert first.status.value == "fail"
    assert "nf4_quantize should return packed, absmax" in first.result.detail


def test_a_single_output_is_returned_alone_and_not_in_a_tuple() -> None:
    def in_a_tuple(*arguments: Any, **settings: Any) -> tuple[Any]:
        return (operations.every()["lora_linear"].reference(*arguments, **settings),)

    results = suite_run.run(Implementation("mine", "operation", "lora_linear", in_a_tuple, dtypes=("float32",)))
    first = next(iter(results))
    assert first.status.value == "fail"
    assert "y should be a tensor; got tuple" in first.result.detail


@pytest.mark.slow
def test_a_fault_of_later_calls_is_reported_with_the_number_of_calls() -> None:
    plan = parity_suite.load_operation("lora_linear").model_copy(update={"checks": ["calls"]})
    for shape, times in (([8, 16], LONG_RUN), ([160, 128], 2)):
        case = parity_suite.OperationCase({"shape": shape, "rows": [3], "rank": 4}, "float32")
        calls: list[int] = []

        right_calls = [sys.maxsize]

        def later(calls: list[int] = calls, right_calls: list[int] = right_calls, **given: Any) -> Any:
            calls.append(1)
            return right("lora_linear")(**given) * (2.0 if len(calls) > right_calls[0] else 1.0)

        mine = Implementation("mine", "operation", "lora_linear", later, dtypes=("float32",))
        (outcome,) = suite_run.run_case(mine, plan, case, wide=True)
        assert outcome.result.outcome is Outcome.PASS
        right_calls[0] = len(calls) - times + 1  # the repeated calls come last, and the second of them is wrong
        calls.clear()
        (outcome,) = suite_run.run_case(mine, plan, case, wide=True)
        assert outcome.result.tensor.startswith(f"{times} times")


class _Bent(torch.autograd.Function):
    """Passes x on, and twice its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return 2 * dy


def test_the_gradient_of_the_last_of_several_outputs_is_compared() -> None:
    assert failing_examples("lora_qkv", on_output("lora_qkv", 2, _Bent.apply)) == {"backward", "calls"}


def test_a_backward_pass_that_overwrites_an_argument_is_found() -> None:
    def call(x: torch.Tensor, **given: Any) -> Any:
        y = right("lora_mlp")(x=x, **given)
        if x.requires_grad:
            x.register_hook(lambda dx: x.data.copy_(dx) * 0 + dx)
        return y

    assert failing_examples("lora_mlp", call) == {"arguments", "calls"}


def test_only_an_example_of_the_suite_is_called_a_thousand_times_in_a_row() -> None:
    plan = parity_suite.load_operation("lora_linear").model_copy(update={"checks": ["calls"]})

    def calls(case: parity_suite.OperationCase) -> int:
        count = 0

        def counted(**given: Any) -> Any:
            nonlocal count
            count += 1
            return right("lora_linear")(**given)

        mine = Implementation("mine", "operation", "lora_linear", counted, dtypes=("float32",))
        assert [one.status.value for one in suite_run.run_case(mine, plan, case, wide=True)] == ["pass"]
        return count

    values = {"shape": [8, 16], "rows": [3], "rank": 4}
    assert calls(parity_suite.OperationCase(values, "float32")) > LONG_RUN
    assert REPEATS < calls(parity_suite.OperationCase(values, "float32", drawn=True)) < LONG_RUN


def test_an_exception_of_a_call_under_inference_mode_names_the_mode() -> None:
    def by_version(absmax: torch.Tensor, block: int) -> Any:
        assert absmax._version >= 0  # raises RuntimeError under inference_mode
        return right("double_quantize")(absmax, block)

    tried = suite_run.run(Implementation("mine", "operation", "double_quantize", by_version, dtypes=("float32",)))
    said = {one.check: one.result.detail for one in tried if one.status.value == "fail"}
    assert "in a call under inference_mode" in said["overlap"]
