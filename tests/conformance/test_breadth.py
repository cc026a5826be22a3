"""The fixed sample of cases that covers pairs of settings, and random cases."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.cli import main
from harness.conformance import operations, parity_suite
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.comparison.inputs import inputs
from harness.conformance.drawing import sample
from harness.conformance.drawing.combinations import switched_kinds
from harness.conformance.drawing.covering import covering, each_value, every_pair, values
from harness.conformance.drawing.factors import Factor, of_config, of_signature
from harness.conformance.drawing.search import cases, search
from harness.conformance.execution import suite_run
from harness.conformance.execution.acceptance import is_accepted
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.tolerance_constants import LONG_SUM, NOISE_FACTOR
from harness.errors import Exit
from harness.methods.registry import DTYPES, Implementation, discover
from harness.methods.spec import Adapted, methods
from harness.records.record import CheckResult, Outcome
from reference import adalora, galore, lora
from reference.operations import multi_lora

DRAWN = CaseSelection(drawn=100, seed=11)
WIDE = CaseSelection(wide=True)
LEVELS = {"a": [1, 2, 3], "b": ["x", "y"], "c": [True, False], "d": [0.0, 0.5, 1.0, 2.0]}


def test_a_covering_sample_has_every_pair_of_levels_that_is_valid() -> None:
    def valid(row: dict[str, Any]) -> bool:
        return not (row["a"] == 3 and row["c"])

    rows = [values(row, LEVELS) for row in covering(LEVELS, every_pair(LEVELS), valid)]
    assert all(map(valid, rows))
    for one, other in itertools.combinations(LEVELS, 2):
        met = {(row[one], row[other]) for row in rows}
        assert set(itertools.product(LEVELS[one], LEVELS[other])) - met == (
            {(3, True)} if (one, other) == ("a", "c") else set()
        )
    assert len(rows) < 24 < 48


def test_a_covering_sample_has_every_pair_that_is_possible_when_most_rows_are_not() -> None:
    sizes = [12, 1, 3, 130]
    levels = {"rank": sizes, "least": sizes, "steps": sizes, "first": sizes, "last": [0, 3], "other": [1, 2, 3]}

    def valid(row: dict[str, Any]) -> bool:
        return bool(row["least"] <= row["rank"] and row["first"] + row["last"] < row["steps"])

    def pairs(rows: Iterable[dict[str, Any]]) -> set[Any]:
        return {pair for row in rows for pair in itertools.combinations(row.items(), 2)}

    rows = [values(row, levels) for row in covering(levels, every_pair(levels), valid)]
    every = (dict(zip(levels, row, strict=True)) for row in itertools.product(*levels.values()))
    assert all(map(valid, rows))
    assert pairs(rows) == pairs(filter(valid, every))


@pytest.mark.parametrize("target", ["lora", "galore", "lora_linear", "multi_lora_linear", "adamw8bit_step"])
def test_the_fixed_sample_is_always_the_same_and_has_every_setting(target: str) -> None:
    plan = parity_suite.load_plan(target)
    cases = list(sample.fixed(plan, WIDE, DTYPES))
    assert cases == list(sample.fixed(plan, WIDE, DTYPES))
    if isinstance(plan, parity_suite.MethodSuite):
        sampled = [case.config for case in cases if isinstance(case, parity_suite.MethodCase) and case.sampled]
        factors = of_config(methods()[target].fields)
    else:
        sampled = [case.values for case in cases if isinstance(case, parity_suite.OperationCase) and case.sampled]
        factors = of_signature(operations.every()[target].arguments)
    for name in factors:
        assert len({str(values.get(name)) for values in sampled}) > 1, name


def wrong_at_other_ranks(model: Any, config: lora.Config, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.scaling *= 2.0 if 140 < config.rank < 240 else 1.0  # type: ignore[attr-defined]
    return adapted


@pytest.mark.nightly
@pytest.mark.slow
def test_an_implementation_that_is_wrong_at_other_ranks_only_fails_a_drawn_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    plan = parity_suite.load("lora").model_copy(
        update={
            "configs": [{"rank": 3}], "layers": ["linear"], "dtypes": ["float32"], "checks": ["forward", "gradient"],
        }
    )  # fmt: skip
    monkeypatch.setattr(parity_suite, "load_plan", lambda _: plan)
    mine = Implementation("mine", "method", "lora", wrong_at_other_ranks, dtypes=("float32",))
    usual = {one.status.value for one in suite_run.run(mine, breadth=WIDE)}
    drawn = [one for one in suite_run.run(mine, breadth=DRAWN) if one.status.value == "fail"]
    assert "fail" not in usual
    assert {one.check for one in drawn} & {"forward", "gradient"}
    assert drawn[-1].case == "rank=141 9x24x40"  # shrunk to the smallest


def test_every_wanted_value_that_is_valid_occurs_in_a_case() -> None:
    plain, wanted = {"a": 1, "b": "x", "c": True}, {"a": [2, 3, 4], "b": ["y", "z"], "c": [False]}

    def valid(case: dict[str, Any]) -> bool:
        return case["a"] != 4 and not (case["a"] == 2 and case["b"] == "y")

    cases = list(each_value(plain, wanted, valid))
    assert all(map(valid, cases))
    for name, values_of_factor in wanted.items():
        assert {case[name] for case in cases} >= {*values_of_factor} - {4}
    assert len(cases) < sum(map(len, wanted.values()))


@pytest.mark.parametrize("target", ["lora", "galore", "multi_lora_linear", "riemannian_lora_step", "nf4_quantize"])
def test_the_default_cases_have_every_value_of_every_setting(target: str) -> None:
    plan = parity_suite.load_plan(target)
    assert not isinstance(plan, parity_suite.LoaderSuite)
    factors = sample.factors(plan, DTYPES)
    plain = {name: factor.levels[0] for name, factor in factors.items()}
    cases = list(sample.fixed(plan, FEW, DTYPES))
    left_out = {"dtype", *(("dropout", "sides", "model", "magnitude", "weights") if "sides" in factors else ())}
    for name, factor in ((name, factor) for name, factor in factors.items() if name not in left_out):
        tried = [sample.value_of(plan, case, name) for case in cases] + [plain[name]]
        for value in (*factor.levels, *factor.extremes):
            if is_accepted(plan, sample.case_of(plan, plain | {name: value})):
                assert value in tried, (name, value)


@pytest.mark.parametrize("target", ["lora", "dora", "qlora", "adalora", "lora_int8"])
def test_each_word_and_switch_of_a_method_is_tried_with_dropout(target: str) -> None:
    plan = parity_suite.load(target)
    words = {
        name: field.choices or (True, False)
        for name, field in methods()[target].fields.items()
        if isinstance(field.default, str | bool)
    }
    dropping = [case for case in sample.fixed(plan, FEW, DTYPES) if sample.value_of(plan, case, "dropout")]
    assert words
    for name, choices in words.items():
        assert {sample.value_of(plan, case, name) for case in dropping} == {*choices}, name


@pytest.mark.parametrize("target", ["lora_mlp", "adamw8bit_step", "loraplus_groups"])
def test_the_default_cases_of_an_operation_have_every_two_words_together(target: str) -> None:
    plan = parity_suite.load_operation(target)
    factors = {
        name: [level for level in factor.levels if level != "float64"]
        for name, factor in sample.factors(plan, DTYPES).items()
        if all(isinstance(level, str | bool) for level in factor.levels)
    }
    values_of = [
        {name: case.dtype if name == "dtype" else sample.value_of(plan, case, name) for name in factors}
        for case in sample.fixed(plan, FEW, DTYPES)
        if isinstance(case, parity_suite.OperationCase)
    ]
    for (one, some), (other, others) in itertools.combinations(factors.items(), 2):
        wanted = {*itertools.product(some, others)}
        assert wanted <= {(found[one], found[other]) for found in values_of}, (one, other)


@pytest.mark.parametrize("target", ["lora", "dora_linear"])
def test_float64_has_one_example_except_where_it_is_the_only_dtype(target: str) -> None:
    plan = parity_suite.load_plan(target)

    def examples(breadth: CaseSelection, dtypes: Collection[str]) -> int:
        return sum(case.dtype == "float64" for case in plan.cases(breadth, dtypes))

    assert examples(FEW, DTYPES) == 1
    assert examples(WIDE, DTYPES) > 1
    assert examples(FEW, ["float64"]) > 1


def test_an_operation_that_is_wrong_for_some_lengths_fails_in_the_default_cases() -> None:
    def tiled(x: torch.Tensor, W: torch.Tensor, **rest: Any) -> torch.Tensor:
        y = multi_lora.multi_lora_linear(x, torch.nn.functional.linear(x, W), **rest)
        return torch.cat([y[:, :130], 0 * y[:, 130:]], dim=1) if y.shape[1] < 1400 else y

    mine = Implementation("mine", "operation", "multi_lora_linear", tiled, dtypes=("float32",))
    plan = parity_suite.load_operation("multi_lora_linear").model_copy(update={"checks": ["outputs", "backward"]})
    tried = [one for case in sample.fixed(plan, FEW, mine.dtypes) for one in suite_run.run_case(mine, plan, case)]
    failed = [one for one in tried if one.status.value == "fail"]
    assert {one.check for one in failed} >= {"outputs", "backward"}
    tokens = {word for one in failed for word in one.case.split() if word.startswith("tokens=")}
    assert tokens == {"tokens=515", "tokens=1030"}


@pytest.mark.parametrize(
    ("target", "together"),
    [
        ("lora_linear", {"rows": [65_600]}),
        ("nf4_dequantize", {"shape": [131_100, 32], "block": 32}),
        ("multi_lora_linear", {"distinct": 33}),
        ("galore_step", {"step": 1001, "beta2": 0.999}),
        ("adamw8bit_step", {"step": 10_001, "beta2": 0.9999}),
        ("lora_mlp", {"activation": "gelu-tanh", "gate": "large", "dora": False}),
    ],
)
def test_the_wide_sample_has_values_that_show_a_fault_only_together(target: str, together: dict[str, Any]) -> None:
    cases = sample.fixed(parity_suite.load_operation(target), WIDE, ["float32", "float16"])
    assert any(
        together.items() <= case.values.items() for case in cases if isinstance(case, parity_suite.OperationCase)
    )


@pytest.mark.slow
def test_the_wide_sample_has_every_kind_of_layer_with_equal_sides() -> None:
    plan = parity_suite.load("lora")
    cases = [case for case in sample.fixed(plan, WIDE, ["float32"]) if isinstance(case, parity_suite.MethodCase)]
    assert {case.kind for case in cases if case.sampled and case.shape.inputs == case.shape.outputs} == {*plan.layers}
    for kind in ("conv1d", "conv2d", "experts"):
        configs = [case.config for case in cases if case.kind == kind]
        assert {config.get("init", "kaiming") for config in configs} >= {"kaiming", "gaussian", "orthogonal"}
        assert any(config.get("rslora") for config in configs)


@pytest.mark.parametrize("breadth", [FEW, CaseSelection(full=True)])
def test_a_convolution_with_groups_gets_ranks_that_the_groups_share(breadth: CaseSelection) -> None:
    cases = [case for case in parity_suite.load("lora").cases(breadth) if case.kind == "conv2d-grouped"]
    assert cases
    assert all(case.config["rank"] % parity_suite.GROUPS == 0 for case in cases)
    assert all(case.config.get("init") != "orthogonal" for case in cases)


def test_the_last_of_several_token_numbers_is_the_padding_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, _ = inputs(nn.Embedding(30, 8, padding_idx=1), 7, torch.float32, generator)
    one, _ = inputs(nn.Embedding(30, 8, padding_idx=1), 1, torch.float32, generator)
    assert int(ids[-1]) == 1
    assert int(one) != 1


def attach_without_state(model: Any, config: adalora.Config, generator: torch.Generator) -> Any:
    adapted = adalora.attach(model, config, generator)
    adapted.state = dict  # type: ignore[method-assign]
    return adapted


def test_an_adalora_whose_masks_are_not_in_its_state_is_not_accused() -> None:
    plan = parity_suite.load("adalora").model_copy(update={"checks": ["budget"]})
    cases = [one for one in plan.cases(FEW, ["float32"]) if isinstance(one, parity_suite.MethodCase)]
    pruning = next(one for one in cases if one.config["rank"] > one.config["target_rank"])
    mine = Implementation("mine", "method", "adalora", attach_without_state, dtypes=("float32",))
    found = [*suite_run.run_case(mine, plan, pruning)]
    assert {one.result.outcome for one in found} == {Outcome.PASS}, found[0].result.detail


@pytest.mark.parametrize("distinct", [1, 2, 9, 33])
def test_so_many_different_adapters_occur_in_a_batch(distinct: int) -> None:
    arguments = operations.every()["multi_lora_linear"].arguments
    given = arguments(
        torch.float32, torch.Generator(), ids=(1, 0, -1, 1), ranks=(3, 16), shape=(4, 4), distinct=distinct
    )
    assert len(given["As"]) == distinct
    assert set(given["ids"].tolist()) == {-1, *range(distinct)}


@pytest.mark.parametrize("padding", ["left", "right", "left-token", "right-token"])
def test_sequences_of_mixed_lengths_are_padded_on_one_side(padding: str) -> None:
    arguments = operations.every()["multi_lora_linear"].arguments
    given = arguments(
        torch.float32, torch.Generator(), ids=(0, -1, 0), ranks=(2,), shape=(8, 4), tokens=3, padding=padding
    )
    x = given["x"].flip(1) if padding.startswith("left") else given["x"]
    token = x[0, -1]
    assert bool(token.any()) == padding.endswith("token")
    is_padding = (x == token).all(-1)
    assert is_padding.tolist() == [[False, True, True], [False, False, True], [False, False, False]]


@pytest.mark.nightly
@pytest.mark.usefixtures("forks")
@pytest.mark.slow
def test_a_seed_draws_the_same_cases_and_another_seed_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))

    def drawn(seed: str) -> list[str]:
        asked = [
            "check",
            "reference",
            "--op",
            "double_dequantize",
            "--dtype",
            "float32",
            "--drawn",
            "8",
            "--seed",
            seed,
        ]
        assert main([*asked, "--json"]) == Exit.PASS
        cases = dict.fromkeys(row["case"] for row in json.loads(capsys.readouterr().out)["checks"])
        fixed = {str(case) for case in sample.fixed(parity_suite.load_plan("double_dequantize"), WIDE, ["float32"])}
        return [case for case in cases if case not in fixed]

    assert drawn("3") == drawn("3") != drawn("4")


def test_nothing_can_be_drawn_of_the_planted_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--self-test", "--drawn", "3"]) == Exit.USAGE
    assert "--self-test" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_who_offers_one_dtype_only_meets_every_config_and_shape_in_it(dtype: str) -> None:
    for name in (name for name in parity_suite.names() if parity_suite.kind_of(name) in ("method", "base")):
        plan = parity_suite.load(name)
        met = list(plan.cases(FEW, [dtype]))
        if dtype in plan.dtypes:
            assert {case.dtype for case in met} == {dtype}
            assert all(any(case.config == config for case in met) for config in plan.configs)
            assert {case.shape for case in met} == {*plan.shapes, *plan.shapes_of_typical}
        else:
            assert met == []


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "pissa", "vera", "galore", "loha", "lokr"])
def test_the_sample_has_layers_with_one_output_and_with_one_input(method: str) -> None:
    sides = {(case.shape.inputs, case.shape.outputs) for case in sample.fixed(parity_suite.load(method), WIDE, DTYPES)}
    assert any(inputs > 1 == outputs for inputs, outputs in sides)
    assert any(inputs == 1 < outputs for inputs, outputs in sides)


@pytest.mark.parametrize(("scale", "fails"), [(1.0, False), (-1.0, False), (9.0, True)])
def test_a_single_number_from_an_svd_may_start_with_either_sign(scale: float, fails: bool) -> None:
    def rescale(layer: Any, _: Any) -> None:
        layer.A.data *= scale
        layer.B.data /= scale

    plan = parity_suite.load("pissa").model_copy(update={"checks": ["initial"]})
    shape = parity_suite.CaseShape.model_validate({"tokens": 9, "in": 40, "out": 1})
    case = parity_suite.MethodCase({"rank": 1, "alpha": 8.0}, "linear", shape, "float32")
    outcomes = suite_run.run_case(changed("pissa", rescale), plan, case, wide=False)
    assert any(one.result.outcome is Outcome.FAIL for one in outcomes) == fails


def test_a_seed_without_cases_to_draw_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "fused", "--seed", "3"]) == Exit.USAGE
    assert "--drawn" in capsys.readouterr().err


PLAIN = {"rank", "target_rank", "alpha", "eps"}
RANKED = [name for name in methods() if "rank" in methods()[name].fields and name in parity_suite.names()]
DROPPING = [name for name in methods() if "dropout" in methods()[name].fields and name in parity_suite.names()]


def changed(target: str, change: Callable[[Any, Any], None]) -> Implementation:
    """Return the reference of a Method; change: takes each adapted layer and the config."""

    def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
        adapted = importlib.import_module(f"reference.{target}").attach(model, config, generator)
        for layer in adapted.layers.values():
            change(layer, config)
        return adapted

    return Implementation("mine", "method", target, attach, dtypes=DTYPES)


def failing(implementation: Implementation, cases: Iterable[parity_suite.MethodCase]) -> set[str]:
    """Return the checks that fail in one of these cases."""
    plan = parity_suite.load(implementation.target)
    outcomes = itertools.chain.from_iterable(suite_run.run_case(implementation, plan, case) for case in cases)
    return {one.check for one in outcomes if one.result.outcome is Outcome.FAIL}


def is_wrong_above_rank_16(layer: Any, config: Any) -> None:
    right = layer.forward
    layer.forward = lambda x: right(x) * (1.05 if config.rank > 16 else 1.0)


def drops_when_evaluating(layer: Any, config: Any) -> None:
    for child in layer.modules():
        if isinstance(child, nn.Dropout):
            child.forward = lambda x: nn.functional.dropout(x, config.dropout)  # type: ignore[method-assign]


def first_at_once(targets: Sequence[str]) -> list[Any]:
    """Return the targets as parameters of a test that tries the first one for every commit and the others at night."""
    return [targets[0], *(pytest.param(one, marks=pytest.mark.nightly) for one in targets[1:])]


def test_who_is_wrong_in_layers_of_a_million_numbers_only_fails_the_default_checks() -> None:
    def is_wrong_if_large(layer: Any, config: Any) -> None:
        right, large = layer.forward, layer.base.weight.numel() > 2**20
        layer.forward = lambda x: right(x) * (1.05 if large else 1.0)

    cases = [case for case in sample.fixed(parity_suite.load("lora"), FEW, ["float32"]) if case.is_large]
    mine = changed("lora", is_wrong_if_large)
    outcomes = [one for case in cases for one in suite_run.run_case(mine, parity_suite.load("lora"), case)]
    failed = {one.check for one in outcomes if one.result.outcome is Outcome.FAIL}
    assert failed >= {"forward", "gradient"}
    assert "trajectory" not in {one.check for one in outcomes}  # only the checks of a Cell's gate are tried there


def test_who_moves_the_weights_of_galore_wrongly_at_other_ranks_only_fails_the_default_checks() -> None:
    def attach(model: nn.Module, config: galore.Config, generator: torch.Generator) -> Any:
        scale = config.scale * (1.05 if config.rank in (40, 260) else 1.0)
        return galore.attach(model, dataclasses.replace(config, scale=scale), generator)

    plan, mine = parity_suite.load("galore"), Implementation("mine", "method", "galore", attach, dtypes=DTYPES)
    ranks = set[int]()
    for case in sample.fixed(plan, FEW, ["float32"]):
        if case.is_brief and not case.is_large:
            outcomes = suite_run.run_case(mine, plan, case)
            ranks |= {
                case.config["rank"] for one in outcomes if one.check == "step" and one.result.outcome is Outcome.FAIL
            }
    assert ranks == {40, 260}


def test_gradients_may_be_less_exact_only_if_they_are_long_sums_in_32_bits() -> None:
    plan = parity_suite.load_operation("lora_linear")
    mine = Implementation(
        "mine", "operation", "lora_linear", operations.every()["lora_linear"].reference, dtypes=DTYPES
    )
    typical = next(case for case in plan.cases(FEW, ["float32"]) if case.typical)

    def allowed(dtype: str, rows: int) -> float:
        case = dataclasses.replace(typical, dtype=dtype, values={**typical.values, "rows": [rows]})
        return suite_run.call(mine, plan, case)[1].factor("backward")

    assert allowed("float32", LONG_SUM) == allowed("bfloat16", LONG_SUM + 1) == NOISE_FACTOR
    assert allowed("float32", LONG_SUM + 1) > NOISE_FACTOR
    of_layers = parity_suite.load("lora").long_sums(LONG_SUM, gradient=LONG_SUM + 1)
    assert of_layers.keys() == {"gradient"}


@pytest.mark.parametrize(("side", "is_long"), [(LONG_SUM, False), (LONG_SUM + 1, True)])
def test_a_long_side_counts_in_32_bits_only(side: int, is_long: bool) -> None:
    plan = parity_suite.load("lora")
    shape = parity_suite.CaseShape.model_validate({"tokens": 1, "in": side, "out": 2})
    reference = discover().find("method", "lora", "reference")
    for form in ("plain", "wide"):  # the layer `wide` is larger, and is not adapted
        case = parity_suite.MethodCase({"rank": 1}, "linear", shape, "float32", form)
        made = suite_run.attach(reference, plan, case)[1]
        assert (made.factor("calls") > NOISE_FACTOR) is is_long
        assert made.factor("calls", "bfloat16") == made.factor("calls", "float16") == NOISE_FACTOR
        made = suite_run.attach(reference, plan, dataclasses.replace(case, dtype="float16"))[1]
        assert made.factor("calls") == NOISE_FACTOR
        assert (made.factor("calls", "float32") > NOISE_FACTOR) is is_long  # a copy in float32


@pytest.mark.parametrize(
    ("name", "is_long"), [("lora_linear", True), ("nf4_dequantize", False), ("lorafa_step", False)]
)
def test_a_long_side_counts_in_outputs_only_if_a_product_sums_over_it(name: str, is_long: bool) -> None:
    plan = parity_suite.load_operation(name)
    mine = Implementation("mine", "operation", name, operations.every()[name].reference, dtypes=DTYPES)
    typical = next(case for case in plan.cases(FEW, ["float32"]) if case.typical)
    case = dataclasses.replace(typical, values={**typical.values, "shape": [8, 64 * LONG_SUM]})
    made = suite_run.call(mine, plan, case)[1]
    usual = plan.factors().get("outputs", NOISE_FACTOR)
    assert (made.factor("outputs") > usual) is is_long
    assert made.factor("outputs", "bfloat16") == usual


def test_a_switch_is_tried_with_each_kind_of_layer() -> None:
    there = {
        "a": Factor((False, True)),
        "b": Factor((True, False)),
        "kind": Factor(("linear", "conv", "conv-x", "table")),
    }
    assert [*switched_kinds(there, {"a": ["linear"]})] == [{"a": True, "kind": "conv"}, {"a": True, "kind": "table"}]
    assert [*switched_kinds(there, {"a": ["conv-x", "linear"]})] == [{"a": True, "kind": "table"}]

    def attach(model: nn.Module, config: lora.Config, generator: torch.Generator) -> Adapted:
        kinds = {type(model.get_submodule(name)) for name in config.targets}
        is_table = nn.Embedding in kinds
        return lora.attach(model, dataclasses.replace(config, rslora=config.rslora and not is_table), generator)

    plan, mine = parity_suite.load("lora"), Implementation("mine", "method", "lora", attach, dtypes=DTYPES)
    cases = [one for one in sample.fixed(plan, FEW, ["float32"]) if one.is_brief and "rslora=True" in str(one)]
    outcomes = [one for case in cases for one in suite_run.run_case(mine, plan, case)]
    assert {one.case for one in outcomes if one.result.outcome is Outcome.FAIL} == {
        str(case) for case in cases if "embedding" in str(case)
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", first_at_once(RANKED))
def test_who_is_wrong_at_large_ranks_fails_without_offering_anything_optional(target: str) -> None:
    usual = sample.fixed(parity_suite.load(target), FEW, ["float32"])
    plain = [case for case in usual if set(case.config) <= PLAIN | {"threshold"}]
    assert "forward" in failing(changed(target, is_wrong_above_rank_16), plain)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", first_at_once(DROPPING))
def test_dropout_is_tried_in_float32_and_16_bits(target: str, dtype: str) -> None:
    cases = [case for case in sample.fixed(parity_suite.load(target), FEW, [dtype]) if case.config.get("dropout")]
    assert "dropout" in failing(changed(target, drops_when_evaluating), cases[:1])


@pytest.mark.slow
def test_drawn_outcomes_are_reported_before_a_later_case_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    reported: list[CheckOutcome] = []
    tried: list[str] = []

    def run_case(case: sample.AnyCase) -> list[CheckOutcome]:
        tried.append(str(case))
        if len(tried) == 3:
            raise KeyboardInterrupt
        result = CheckResult(check="lora/forward/float32/warm", outcome=Outcome.PASS)
        return [
            CheckOutcome(
                implementation="mine", kind="method", target="lora", dtype=case.dtype, case=str(case), result=result
            )
        ]

    with pytest.raises(KeyboardInterrupt):
        search(parity_suite.load("lora"), DRAWN, ["float32"], run_case, reported.append)
    assert [one.case for one in reported] == tried[:2]


@pytest.mark.parametrize("target", methods())
def test_every_value_that_is_tried_keeps_the_limits_that_explain_prints(target: str) -> None:
    fields = methods()[target].fields
    for name, factor in of_config(fields).items():
        ends = [end for end in (factor.least, factor.most) if end is not None]
        tried = [*factor.levels, *factor.extremes, *(map(int, ends) if fields[name].type == "int" else ends)]
        assert [problem for value in tried if (problem := fields[name].problem(value))] == []


def test_a_key_is_drawn_up_to_the_largest_number_of_63_bits() -> None:
    drawn = [case.config.get("projection_key", 0) for case in cases(parity_suite.load("vera"), ["float32"], 100, 0)]
    assert 2**32 < max(drawn) < 2**63


def test_a_text_selects_among_the_drawn_cases_which_a_seed_draws_again() -> None:
    def tried_by(breadth: CaseSelection) -> list[str]:
        tried: list[str] = []

        def run_case(case: sample.AnyCase) -> list[CheckOutcome]:
            tried.append(f"{case} {case.dtype}")
            return []

        search(parity_suite.load("lora"), breadth, ["float32", "float16"], run_case, print)
        return tried

    few = CaseSelection(drawn=20, seed=3)
    every = tried_by(few)
    assert len(every) > 10
    assert tried_by(dataclasses.replace(few, case=every[7])) == [one for one in every if every[7] in one]


def refuses_to_load(model: Any, config: lora.Config, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unexpected key first.A")

    model.load_state_dict = refuse
    return adapted


@pytest.mark.slow
def test_a_walk_names_the_exception_of_a_rule_and_the_rules_before_it() -> None:
    mine = Implementation("mine", "method", "lora", refuses_to_load, dtypes=("float32",))
    plan = parity_suite.load("lora").model_copy(update={"checks": ["walk"]})
    shape = parity_suite.CaseShape.model_validate({"tokens": 1, "in": 24, "out": 40})
    case = parity_suite.MethodCase({"rank": 3}, "linear", shape, "float32")
    (outcome,) = suite_run.run_case(mine, plan, case, wide=True)
    assert "Unexpected key first.A" in outcome.result.detail
    assert outcome.result.detail.endswith("load_state_dict()")
    assert "attach(); " in outcome.result.detail


def test_many_experts_are_tried_with_small_weights_only() -> None:
    plan = parity_suite.load_operation("lora_experts")
    sizes = {"experts": 300, "rank": 2}
    small, large = (
        parity_suite.OperationCase({"shape": shape, **sizes}, "float32", sampled=True)
        for shape in ([24, 40], [228, 259])
    )
    assert is_accepted(plan, small)
    assert not is_accepted(plan, large)
    tried = [case.values for case in sample.fixed(plan, CaseSelection(wide=True), ("float32",))]
    assert any(values["experts"] == 300 for values in tried)


def test_oft_gets_no_layer_that_cannot_be_divided_into_blocks() -> None:
    plan = parity_suite.load("oft")
    prime, even = (
        parity_suite.CaseShape.model_validate({"tokens": 1, "in": inputs, "out": 264}) for inputs in (257, 256)
    )
    assert not is_accepted(plan, parity_suite.MethodCase({"block_size": 40}, "linear", prime, "float32"))
    assert is_accepted(plan, parity_suite.MethodCase({"block_size": 40}, "linear", even, "float32"))


def test_a_setting_whose_least_value_is_zero_is_tried_with_zero() -> None:
    """lora_int8's threshold 0 switches outliers off, so a program may treat 0 as any other number."""
    assert 0.0 in sample.factors(parity_suite.load("lora_int8"), DTYPES)["threshold"].levels
