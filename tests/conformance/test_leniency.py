"""Results that correct programs may give in extreme cases are excused, and wrong results in the same cases are not."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance import operations, packing, parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.threads import at_once
from harness.conformance.comparison.tolerance_policies import noise_floor, rounded_once
from harness.conformance.drawing import sample
from harness.conformance.drawing.factors import Factor
from harness.conformance.drawing.strategies import of_factor
from harness.conformance.execution import suite_run
from harness.conformance.execution.acceptance import is_accepted
from harness.conformance.operation import cloned
from harness.conformance.operations import adamw8bit_step
from harness.methods.registry import Implementation
from harness.methods.spec import Adapted
from harness.records.record import Outcome
from reference import adalora, galore, loha, lora, qlora
from reference.operations import nf4
from reference.shared.layers import replace as replace_layer


def failures(target: str, change: Any, case: parity_suite.AnyCase) -> set[str]:
    """Return the checks that fail if `change` is applied to each output of the Operation's reference."""
    reference = operations.every()[target].reference

    def program(**arguments: Any) -> Any:
        found = reference(**arguments)
        return tuple(map(change, found)) if isinstance(found, tuple) else change(found)

    plan = parity_suite.load_operation(target)
    mine = Implementation("mine", "operation", target, program, dtypes=("float16", "float32"))
    return {one.check for one in suite_run.run_case(mine, plan, case) if one.result.outcome is Outcome.FAIL}


@pytest.mark.parametrize("target", ["lora_linear", "lora_qkv", "lora_mlp"])
def test_nan_everywhere_fails_for_large_inputs_too(target: str) -> None:
    cases = sample.fixed(parity_suite.load_operation(target), FEW, ["float16"])
    large = next(case for case in cases if isinstance(case, parity_suite.OperationCase) and case.magnitude == "large")
    assert failures(target, lambda y: y * torch.nan, large) & {"outputs", "backward"}


def test_an_overflow_of_a_scaled_product_is_excused_for_huge_inputs_and_infinities_for_usual_ones_are_not() -> None:
    values = {"shape": [1, 3008], "rows": [16], "rank": 257, "scaling": -18.0}
    case = parity_suite.OperationCase(values, "float16", magnitude="huge", drawn=True)

    def program(
        x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor, scaling: float, mask: Tensor | None
    ) -> Tensor:
        h = scaling * (x @ A.T)  # overflows
        return torch.nn.functional.linear(x, W, bias) + h @ B.T

    plan = parity_suite.load_operation("lora_linear").model_copy(update={"checks": ["outputs"]})
    mine = Implementation("mine", "operation", "lora_linear", program, dtypes=("float16",))
    subject, _ = suite_run.call(mine, plan, case)
    y = subject.call()["y"]
    assert not y.isfinite().all()  # otherwise the test shows nothing
    assert {one.result.outcome for one in suite_run.run_case(mine, plan, case)} == {Outcome.PASS}
    usual = replace(case, magnitude="normal")
    assert failures("lora_linear", lambda y: y.masked_fill(y == y.min(), torch.inf), usual) >= {"outputs"}


@pytest.mark.parametrize("layout", ["plain", "expanded", "transposed", "columns"])
def test_an_overflow_in_a_gradient_is_excused_for_huge_inputs_and_not_for_usual_ones(layout: str) -> None:
    def infinity_passes(magnitude: str) -> bool:
        values = {"shape": [1, 3008], "rows": [16], "rank": 257, "scaling": 1.0}
        case = parity_suite.OperationCase(values, "float16", magnitude=magnitude, drawn=True)
        mine = Implementation("mine", "operation", "lora_linear", operations.every()["lora_linear"].reference)
        subject, state = suite_run.call(mine, parity_suite.load_operation("lora_linear"), case)
        seen = operation_call.gradients(subject, subject.function, torch.float16, state, layout=layout)
        seen["grad B"].view(-1)[:1] = torch.inf
        return operation_call.judge_gradients(subject, state, 2.0, mine=seen, layout=layout).passed

    assert infinity_passes("huge")
    assert not infinity_passes("normal")


@pytest.mark.parametrize("target", ["galore_step", "galore8bit_step"])
def test_a_step_with_a_learning_rate_of_zero_may_keep_a_nan_from_the_parameter_but_not_from_a_moment(
    target: str,
) -> None:
    """BLAS, for example, does not read the factors of a product that it multiplies by 0."""
    reference = operations.every()[target].reference
    plan = parity_suite.load_operation(target).model_copy(update={"checks": ["nonfinite"]})
    case = next(case for case in plan.cases(FEW, ["float32"]) if isinstance(case, parity_suite.OperationCase))
    case = replace(case, values={**case.values, "lr": 0.0})

    def keeping(index: int) -> Any:
        def step(**given: Any) -> Any:
            outputs = list(reference(**given))
            outputs[index] = outputs[index].nan_to_num() if outputs[index].is_floating_point() else outputs[index]
            return tuple(outputs)

        return Implementation("mine", "operation", target, step, dtypes=("float32",))

    def outcomes(mine: Implementation) -> list[Outcome]:
        return [one.result.outcome for one in suite_run.run_case(mine, plan, case, wide=True)]

    assert outcomes(keeping(0)) == [Outcome.PASS]
    for index, name in enumerate(operations.every()[target].outputs):
        if name == {"galore_step": "M", "galore8bit_step": "M_absmax"}[target]:
            assert outcomes(keeping(index)) == [Outcome.FAIL]


def test_an_infinite_gradient_of_an_output_that_is_not_used_is_not_excused() -> None:
    plan = parity_suite.load_operation("lora_qkv")
    values = {"shape": [48, 128], "rows": [2, 31], "ranks": [8, 8, 8], "groups": 4, "bias": False}
    case = parity_suite.OperationCase(values, "float16", magnitude="huge")
    mine = Implementation("mine", "operation", "lora_qkv", operations.every()["lora_qkv"].reference)
    subject, state = suite_run.call(mine, plan, case)
    seen = operation_call.gradients(subject, subject.function, torch.float16, state, used=["q"])
    assert operation_call.judge_gradients(subject, state, 2.0, mine=seen, used=["q"]).passed
    seen["grad As[1]"].view(-1)[:1] = torch.inf  # a factor of k
    assert not operation_call.judge_gradients(subject, state, 2.0, mine=seen, used=["q"]).passed


def test_either_number_is_right_near_the_middle_of_two_16_bit_numbers_only() -> None:
    middle = torch.tensor([5.109375 - 1e-7, 5.109375 + 1e-7] * 50, dtype=torch.float64)
    up, down = (torch.full((100,), value, dtype=torch.bfloat16) for value in (5.125, 5.09375))
    assert rounded_once({"p": up}, {"p": middle}).passed
    assert rounded_once({"p": down}, {"p": middle}).passed
    assert not rounded_once({"p": down}, {"p": middle + 1e-3}).passed


def test_a_parameter_that_a_step_moves_near_zero_is_judged_by_its_value_before_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=generator).half()
    step = p.float() * (1 - 1e-3 * torch.rand(1000, generator=generator))
    truth = p.double() - step.double()
    by_float32 = (p.float() - step * (1 + torch.finfo(torch.float32).eps)).half()
    assert not rounded_once({"p": by_float32}, {"p": truth}).passed
    assert rounded_once({"p": by_float32}, {"p": truth}, {"p": p}).passed
    assert not rounded_once({"p": (p - step.half())}, {"p": truth}, {"p": p}).passed


def test_subnormal_numbers_may_be_off_by_a_few_steps_and_not_by_half() -> None:
    truth = torch.full((64,), 1.2e-42, dtype=torch.float64)
    exact = truth.float()
    step = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    near, far = (exact.clone() for _ in range(2))
    near[0] += 2 * step
    far[0] *= 0.5
    assert noise_floor({"y": near}, {"y": truth}, {"y": exact}, "float32").passed
    assert not noise_floor({"y": far}, {"y": truth}, {"y": exact}, "float32").passed


def test_threads_leave_the_switch_interval_as_it_was() -> None:
    before = sys.getswitchinterval()
    assert at_once(lambda number: (number, sys.getswitchinterval() < before), [1, 2]) == [(1, True), (2, True)]
    with pytest.raises(ZeroDivisionError):
        at_once(lambda number: 1 / number, [0, 1])
    assert sys.getswitchinterval() == before


def test_a_drawn_number_is_zero_or_a_normal_number_of_float32() -> None:
    from hypothesis import given, settings

    factor = Factor((0.5,), least=-1.0, most=1.0)
    drawn: list[float] = []

    @settings(max_examples=200, database=None, derandomize=True)
    @given(of_factor(factor))
    def draw(number: float) -> None:
        drawn.append(number)

    draw()
    assert all(number == 0 or abs(number) >= 2.0**-126 for number in drawn)
    assert len(set(drawn)) > 20


def test_a_case_whose_input_would_take_minutes_is_not_drawn() -> None:
    plan = parity_suite.load_operation("lora_linear")
    small, large = ({"shape": [3, 4096], "rows": [rows], "rank": 3} for rows in (17, 2060))
    assert is_accepted(plan, parity_suite.OperationCase(small, "float16"))
    assert not is_accepted(plan, parity_suite.OperationCase(large, "float16"))


def test_a_nan_that_only_the_reference_in_16_bits_spreads_need_not_be_spread_and_a_lost_one_is_found() -> None:
    reference = operations.every()["galore_step"].reference
    case = parity_suite.OperationCase({"shape": [130, 63], "rank": 17, "step": 2}, "bfloat16")

    def in_float32(**arguments: Any) -> tuple[Tensor, ...]:
        dtype = arguments["W"].dtype
        return tuple(t.to(dtype) for t in reference(**cloned(arguments, {dtype: torch.float32})))

    def without_nan(**arguments: Any) -> tuple[Tensor, ...]:
        return tuple(t.nan_to_num() for t in in_float32(**arguments))

    plan = parity_suite.load_operation("galore_step").model_copy(update={"checks": ["nonfinite"]})
    for program, outcome in ((in_float32, Outcome.PASS), (without_nan, Outcome.FAIL)):
        mine = Implementation("mine", "operation", "galore_step", program, dtypes=("bfloat16",))
        assert {one.result.outcome for one in suite_run.run_case(mine, plan, case, wide=True)} == {outcome}


def test_subnormal_numbers_may_all_be_off_by_one_step() -> None:
    truth = torch.full((4096,), 1.4e-43, dtype=torch.float64)
    exact = truth.float()
    step = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    assert noise_floor({"y": exact + step}, {"y": truth}, {"y": exact}, "float32").passed
    assert not noise_floor({"y": exact * 2}, {"y": truth}, {"y": exact}, "float32").passed


def test_a_layer_may_add_its_bias_before_the_weight_is_rounded() -> None:
    plan = parity_suite.load("qlora").model_copy(update={"checks": ["decoded"], "states": ["init"]})
    case = parity_suite.MethodCase({"rank": 3, "alpha": 8.0}, "linear", plan.shapes[0], "bfloat16")

    def attach(model: nn.Module, config: qlora.Config, generator: torch.Generator) -> Any:
        adapted = qlora.attach(model, config, generator)
        for layer in adapted.layers.values():
            if layer.base.bias is not None:
                layer.forward = partial(rounded_at_the_end, layer)
        return adapted

    def rounded_at_the_end(layer: Any, x: Tensor) -> Tensor:
        return (x.float() @ layer.weight().T + layer.base.bias.float()).to(x.dtype)

    mine = Implementation("mine", "method", "qlora", attach, dtypes=("bfloat16",))
    assert {one.result.outcome for one in suite_run.run_case(mine, plan, case)} == {Outcome.PASS}


class _InBuffers(nn.Linear):
    """A linear layer in NF4 whose weight is None and whose codes are buffers. Without a bias, it has no parameter."""

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.is_like = dense.in_features, dense.out_features, dense.weight.dtype
        self.register_parameter("weight", None)
        bias = dense.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        codes, absmax = nf4.quantize(dense.weight)
        self.register_buffer("packed", nf4.pack(codes))
        self.register_buffer("absmax", absmax)

    def forward(self, x: Tensor) -> Tensor:
        codes = nf4.unpack(self.get_buffer("packed"), self.in_features * self.out_features)
        W = nf4.dequantize(codes, self.get_buffer("absmax"), 64).view(self.out_features, self.in_features)
        return nn.functional.linear(x.to(self.is_like), W.to(self.is_like), self.bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_base_may_keep_its_codes_in_buffers(dtype: str) -> None:
    def pack(model: nn.Module, paths: list[str], _: torch.dtype) -> dict[str, Any]:
        packed = {path: _InBuffers(model.get_submodule(path)) for path in paths}  # type: ignore[arg-type]
        for path, layer in packed.items():
            replace_layer(model, path, layer)
        return {path: (one.get_buffer("packed"), one.get_buffer("absmax"), 64) for path, one in packed.items()}

    plan = parity_suite.load("nf4")
    mine = Implementation("mine", "base", "nf4", pack, dtypes=(dtype,))
    case = next(
        one for one in sample.fixed(plan, FEW, [dtype]) if isinstance(one, parity_suite.MethodCase) and not one.minor
    )
    case = replace(case, kind="linear")
    outcomes = [*suite_run.run_case(mine, plan, case, wide=True)]
    assert [one.result.detail for one in outcomes if one.result.outcome is Outcome.FAIL] == []
    assert {"calls", "codes", "save"} <= {one.check for one in outcomes if one.result.outcome is Outcome.PASS}


def test_a_layer_gets_a_dtype_for_adapters_only_if_it_has_none() -> None:
    def packed(**attributes: Any) -> Any:
        model = nn.Sequential(nn.Linear(64, 2, bias=False))

        def pack_layers(model: nn.Module, paths: list[str], _: torch.dtype) -> dict[str, Any]:
            layer = _InBuffers(model.get_submodule(paths[0]))  # type: ignore[arg-type]
            layer.__dict__.update(attributes)
            replace_layer(model, paths[0], layer)
            form = layer.get_buffer("packed"), layer.get_buffer("absmax"), 64
            return {paths[0]: form, "the name of another layer": form}

        mine = Implementation("mine", "base", "nf4", pack_layers)
        assert set(packing.pack(mine, model, ["0"], torch.bfloat16)) == {"0", "the name of another layer"}
        return model[0]

    assert packed().compute_dtype == torch.bfloat16
    assert packed(compute_dtype=None).compute_dtype is None


def test_lamb_may_replace_the_ratio_of_norms_that_are_nan_but_not_the_nan() -> None:
    def found(act: Any) -> str:
        plan = parity_suite.load_operation("lamb8bit_step")
        mine = Implementation("mine", "operation", "lamb8bit_step", act, dtypes=("float32",))
        typical = next(one for one in plan.cases(FEW, ["float32"]) if one.typical)
        [outcome] = suite_run.run_case(mine, plan, typical, only=["nonfinite"])
        return outcome.result.detail if outcome.result.outcome is Outcome.FAIL else ""

    reference = operations.every()["lamb8bit_step"].reference

    def guarded(p: Tensor, **given: Any) -> Any:
        """Take 1 in the place of a norm that is NaN, as `norm > 0` does."""
        after = reference(p=p, **given)
        return adamw8bit_step.reference(p=p, **given) if after[0].isnan().all() else after

    def hiding(p: Tensor, **given: Any) -> Any:
        after = list(reference(p=p, **given))
        return (after[0].nan_to_num(), *after[1:])

    def hiding_all_but_one(p: Tensor, **given: Any) -> Any:
        after = list(reference(p=p, **given))
        first = torch.arange(p.numel()).view_as(p) == 0
        return (torch.where(first, after[0], after[0].nan_to_num()), *after[1:])

    assert found(guarded) == ""
    assert "a NaN in p does not reach p" in found(hiding)
    assert "a NaN in m_absmax does not reach p" in found(hiding_all_but_one)


@pytest.mark.parametrize("dropout", [{"dropout": 0.25}, {"rank_dropout": 0.25}], ids=["dropout", "rank_dropout"])
def test_dropout_is_off_after_attaching_to_a_model_in_eval_mode(dropout: dict[str, float]) -> None:
    target, module = ("loha", loha) if "rank_dropout" in dropout else ("lora", lora)

    def found(change: Any) -> str:
        def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Adapted:
            adapted = module.attach(model, config, generator)
            change(model, adapted)
            return adapted

        plan, mine = parity_suite.load(target), Implementation("mine", "method", target, attach, dtypes=("float32",))
        config = {"rank": 4, "alpha": 8.0, **dropout}
        case = parity_suite.MethodCase(config, "linear", plan.shapes[1], "float32")
        [outcome] = suite_run.run_case(mine, plan, case, only=["eval_mode"])
        return outcome.result.detail if outcome.result.outcome is Outcome.FAIL else outcome.result.outcome.value

    def with_a_container(_: nn.Module, adapted: Adapted) -> None:
        for layer in adapted.layers.values():
            layer.add_module("container", nn.ModuleDict())  # in training mode, without effect

    assert found(lambda model, adapted: None) == found(with_a_container) == "pass"
    assert "first drops features" in found(lambda model, adapted: model.train())
    assert "first drops features" in found(lambda model, adapted: adapted.layers["first"].train())


def test_a_walk_of_galore_does_not_depend_on_the_signs_of_singular_vectors() -> None:
    class OtherSigns(galore.GaLore):
        def update(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> None:
            state = self.state[p]
            if group["rank"] and state.get("step", 0) % group["update_gap"] == 0:
                old = galore.Projector(state.get("P"), state.get("Q"))
                basis = galore.projector(G, group["rank"], group["side"], group["niter"], old)
                sign = -1.0 if state.get("step", 0) else 1.0
                flipped = galore.Projector(*(t if t is None else sign * t for t in (basis.P, basis.Q)))
                galore.galore_step(p, G, state, **{name: group[name] for name in self.options}, given=flipped)
            else:
                super().update(p, G, group)

    class Model(galore.GaLoreModel):
        def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> galore.GaLore:
            made = super().optimizer(lr, weight_decay, bits)
            made.__class__ = OtherSigns
            return made

    def attach(model: nn.Module, config: galore.Config, generator: torch.Generator) -> Adapted:
        adapted = galore.attach(model, config, generator)
        adapted.__class__ = Model
        return adapted

    plan = parity_suite.load("galore")
    mine = Implementation("mine", "method", "galore", attach, dtypes=("float32",))
    shape = parity_suite.CaseShape.model_validate({"tokens": 5, "in": 24, "out": 16})
    case = parity_suite.MethodCase({"rank": 2, "update_gap": 1}, "linear", shape, "float32")
    [outcome] = suite_run.run_case(mine, plan, case, wide=True, only=["walk"])
    assert outcome.result.outcome is Outcome.PASS


@pytest.mark.parametrize(("wrong", "outcome"), [(1.0, Outcome.PASS), (1 + 1e-4, Outcome.FAIL)])
def test_a_regularizer_may_be_the_square_of_torchs_norm(wrong: float, outcome: Outcome) -> None:
    plan = parity_suite.load("adalora").model_copy(update={"checks": ["regularizer"]})
    case = parity_suite.MethodCase(
        {"rank": 181, "regularization": "squared-sum"}, "linear", plan.shapes[0], "float32"
    )  # fmt: skip

    class ByNorms(adalora.AdaLoraAdapted):
        def regularizer(self) -> Tensor:
            grams = [m @ m.T - torch.eye(len(m)) for layer in self.adalora.values() for m in (layer.A, layer.B.T)]
            return (
                wrong * self.config.orthogonality * torch.stack([*map(torch.linalg.vector_norm, grams)]).square().sum()
            )

    def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Adapted:
        adapted = adalora.attach(model, config, generator)
        adapted.__class__ = ByNorms
        return adapted

    mine = Implementation("mine", "method", "adalora", attach, dtypes=("float32",))
    assert {one.result.outcome for one in suite_run.run_case(mine, plan, case)} == {outcome}
