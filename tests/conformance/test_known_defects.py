"""What a known defect may excuse, and when it is said to be gone; which cases are tried by default."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.conformance import checks, parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.execution import suite_run
from harness.conformance.findings import defects
from harness.conformance.findings.defects import Defect
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.errors import Exit
from harness.methods.registry import DTYPES, Implementation, discover
from harness.records.record import CheckResult, Outcome
from reference import galore


def known(name: str = "one", **changed: Any) -> Defect:
    values = {
        "id": name, "library": "torch", "versions": ">=1", "implementation": "acme", "checks": ["lora/merge/*/*"],
        "summary": "merges what it should not", "reproduction": "x.py",
    }  # fmt: skip
    return Defect.model_validate(values | changed)


def failed(
    check: str = "merge", detail: str = "after merging", execution: Execution = Execution.COMPLETED, **result: Any
) -> CheckOutcome:
    found = CheckResult(check=f"lora/{check}/float32/warm", outcome=Outcome.FAIL, detail=detail, **result)
    return CheckOutcome(
        implementation="acme",
        kind="method",
        target="lora",
        dtype="float32",
        case="rank=3",
        result=found,
        execution=execution,
    )


def test_an_exception_is_excused_only_by_an_entry_that_says_so() -> None:
    raised = failed(detail="raised TypeError: anything (x.py:3)", execution=Execution.RAISED)
    for entry, excused in (
        (known(), ""),
        (known(shows=["anything"]), ""),
        (known(shows=["raised ValueError"]), ""),
        (known(shows=["raised TypeError: any"]), "one"),
    ):
        marked, _ = defects.explained([raised], [entry])
        assert marked[0].defect == excused


def test_a_failure_that_looks_otherwise_or_is_larger_is_not_excused() -> None:
    small, large = failed(error=0.01, tensor="codes"), failed(error=0.5, tensor="codes")
    entry = known(shows=["^codes"], at_most=0.1)
    assert [one.defect for one in defects.explained([small, large], [entry])[0]] == ["one", ""]
    assert defects.explained([failed(error=0.01, tensor="absmax")], [entry])[0][0].defect == ""


def test_an_entry_excuses_no_case_that_it_leaves_out() -> None:
    marked, _ = defects.explained([failed()], [known(cases=["rank=*"], not_cases=["rank=3 float32"])])
    assert marked[0].defect == ""
    marked, _ = defects.explained([failed()], [known(cases=["rank=*"], not_cases=["rank=3 float16"])])
    assert marked[0].defect == "one"


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("peft-oft-exact-is-inverse", "block_size=4 cayley=exact 1x64x96"),
        ("peft-oft-few-terms", "block_size=8 terms=2 1x64x96"),
        ("peft-oft-unmerge-inverts", "block_size=8 1x64x96"),
    ],
)
def test_an_entry_of_oft_excuses_another_number_but_neither_nan_nor_another_shape(name: str, case: str) -> None:
    entry = next(one for one in defects.known() if one.id == name)
    for worst, excused in (
        ("[0, 6]: -0.164993201, should be 1.65e-05", True),
        ("[0, 6]: nan, should be 0.164993451", False),
        ("[0, 6]: -inf, should be 0.164993451", False),
        ("shape (1, 3), should be (3,)", False),
        ("missing, though expected", False),
    ):
        for check, tensor, detail in (("merge", "second: y", "after unmerging"), ("unmerge", "first.weight", "")):
            outcome = failed(check, detail, tensor=tensor, worst=worst, error=1.0)
            result = outcome.result.model_copy(update={"check": f"oft/{check}/float64/warm"})
            of = {"implementation": "hf-peft", "target": "oft", "case": case, "dtype": "float64"}
            tried = outcome.model_copy(update={**of, "result": result})
            assert entry.explains(tried) is (excused and bool(entry.matching(tried))), (check, worst)


@pytest.mark.parametrize(
    ("name", "check", "case", "right", "wrong"),
    [
        ("bitsandbytes-lamb8bit-no-trust-ratio", "lamb8bit_step", "step=7", "p", "m"),
        ("peft-lorafa-bfloat16", "lorafa_step", "rank=2", "B0", "A0"),
        ("peft-lorafa-bfloat16", "lorafa_step", "rank=2", "v1", "other"),
        ("peft-lorafa-experts", "lorafa_step", "rank=2 experts=3", "m1", "A1"),
        ("peft-riemannian-experts", "riemannian_lora_step", "rank=2 experts=3", "mA1", "other"),
        ("peft-loraplus-rms-norm", "loraplus_groups", "norm=rms-norm", "after", "rate"),
    ],
)
def test_an_entry_of_a_step_excuses_other_numbers_of_its_tensors_but_neither_nan_nor_another_shape(
    name: str, check: str, case: str, right: str, wrong: str
) -> None:
    entry = next(one for one in defects.known() if one.id == name)
    for tensor, worst, excused in (
        (right, "[0, 6]: -0.164993201, should be 1.65e-05", True),
        (wrong, "[0, 6]: -0.164993201, should be 1.65e-05", False),
        (right, "[0, 6]: nan, should be 0.164993451", False),
        (right, "[0, 6]: inf, should be 0.164993451", False),
        (right, "shape [3], should be [4]", False),
        (right, "missing, though expected", False),
    ):
        outcome = failed("outputs", tensor=tensor, worst=worst, error=0.5)
        result = outcome.result.model_copy(update={"check": f"{check}/outputs/float32/call"})
        of = {"implementation": entry.implementation, "target": check, "case": case, "dtype": "float32"}
        tried = outcome.model_copy(update={**of, "result": result})
        assert entry.matching(tried)
        assert entry.explains(tried) is excused, (tensor, worst)


def test_an_entry_of_a_list_of_problems_excuses_no_other_problem() -> None:
    entry = next(one for one in defects.known() if one.id == "peft-vera-default-dtype")
    same = "{} differs if torch's default dtype is torch.bfloat16 when the adapter is attached"
    two = "; ".join(map(same.format, ("first.A", "second.B")))
    of = {"implementation": "hf-peft", "target": "vera"}
    for detail, excused in (
        (two, True),
        (f"{two}; seeds torch's random numbers", False),
        (f"the number of threads was 1, is 2; {two}", False),
        (same.format("first.d"), False),
    ):
        outcome = failed("settings", detail, error=1.0, policy="exact")
        result = outcome.result.model_copy(update={"check": "vera/settings/float32/init"})
        assert entry.explains(outcome.model_copy(update={**of, "result": result})) is excused, detail


@pytest.mark.slow
@pytest.mark.parametrize(("error", "is_shown"), [(1.01, "without"), (1.0, "with")])
def test_a_defect_of_an_optimizer_with_8_bits_hides_none_without(error: float, is_shown: str) -> None:
    """Otherwise the known defect of galore-torch's optimizer with 8 bits would excuse every defect of its usual one."""

    class Wrong(galore.GaLoreModel):
        def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> galore.GaLore:
            made = super().optimizer(lr, weight_decay)
            made.param_groups[0]["scale"] *= 100.0 if bits == 8 else error
            return made

    def attach(model: Any, config: Any, generator: Any) -> Wrong:
        adapted = galore.attach(model, config, generator)
        return Wrong(adapted.model, adapted.layers, adapted.config)

    plan = parity_suite.load_plan("galore").model_copy(update={"checks": ["optimizer"]})
    shape = parity_suite.CaseShape.model_validate({"tokens": 2, "in": 80, "out": 72})  # above the size of many steps
    case = parity_suite.MethodCase({"rank": 4}, "linear", shape, "float32")
    mine = Implementation("mine", "method", "galore", attach, dtypes=DTYPES)
    (found,) = (one.result for one in suite_run.run_case(mine, plan, case) if one.result.outcome is Outcome.FAIL)
    assert ("with bits=8" in found.tensor) is (is_shown == "with")


def test_ranknum_trains_in_float32_only_on_a_gpu() -> None:
    software = {"peft": "0.21.2"}
    entries = [d for d in defects.known() if d.id.startswith("peft-adalora-ranknum-trains")]
    result = failed("layers", detail="problems", execution=Execution.COMPLETED).result.model_copy(
        update={"check": "adalora/layers/float32/init", "worst": "0.ranknum.default trains but is not the adapter's"}
    )
    on_gpu = failed().model_copy(update={"implementation": "hf-peft", "target": "adalora", "result": result})
    marked, _ = defects.explained([on_gpu], entries, software)
    assert marked[0].defect == "peft-adalora-ranknum-trains-on-gpu"
    passed = result.model_copy(update={"outcome": Outcome.PASS, "worst": ""})
    on_cpu = on_gpu.model_copy(update={"result": passed})
    marked, complaints = defects.explained([on_cpu], entries, software)
    assert (marked[0].defect, complaints) == ("", [])


def test_an_entry_is_not_kept_alive_by_the_failure_of_another() -> None:
    wide, narrow = known("wide"), known("narrow", shows=["^codes"])
    marked, complaints = defects.explained([failed(tensor="absmax")], [wide, narrow])
    assert marked[0].defect == "wide"
    assert len(complaints) == 1
    assert "narrow did not show with torch" in complaints[0]


def test_an_exception_of_one_defect_hides_another() -> None:
    raises, other = known("raises", shows=["raised TypeError"]), known("other", shows=["^codes"])
    raised = failed(detail="raised TypeError: anything (x.py:3)", execution=Execution.RAISED)
    assert defects.explained([raised], [raises, other])[1] == []
    assert len(defects.explained([raised, failed(tensor="absmax")], [raises, other])[1]) == 1


def test_an_entry_that_comes_second_is_alive_all_the_same() -> None:
    assert defects.explained([failed(tensor="codes")], [known("wide"), known("narrow", shows=["^codes"])])[1] == []


def test_each_implementation_of_an_entry_must_show_its_defect() -> None:
    entries = known(also=["other"]).for_each_implementation()
    assert [(one.id, one.implementation) for one in entries] == [("one", "acme"), ("one-in-other", "other")]
    theirs = failed().model_copy(update={"implementation": "other"})
    passed = theirs.result.model_copy(update={"outcome": Outcome.PASS})
    marked, complaints = defects.explained([failed(), theirs], entries)
    assert [one.defect for one in marked] == ["one", "one-in-other"]
    assert complaints == []
    (complaint,) = defects.explained([failed(), theirs.model_copy(update={"result": passed})], entries)[1]
    assert "one-in-other did not show" in complaint


def test_an_entry_for_two_implementations_is_explained_under_both_ids(capsys: pytest.CaptureFixture[str]) -> None:
    entry = next(one for one in defects.known() if one.id == "peft-merge-tied-layers-in-axolotl")
    assert entry.implementation == "axolotl"
    for name, implementation in ((entry.id, "axolotl"), ("peft-merge-tied-layers", "hf-peft")):
        assert main(["explain", name]) == Exit.PASS
        assert f"peft-harness check {implementation} " in capsys.readouterr().out


def test_a_check_of_an_entry_that_passes_is_said() -> None:
    passed = failed("save").model_copy(
        update={"result": CheckResult(check="lora/save/float32/warm", outcome=Outcome.PASS)}
    )
    entry = known(checks=["lora/merge/*/*", "lora/save/*/*"])
    (complaint,) = defects.explained([failed(), passed], [entry])[1]
    assert "did not show in lora/save/*/*" in complaint


def test_every_implementation_of_adaptable_layers_meets_every_config_and_shape_in_two_dtypes() -> None:
    for name in (name for name in parity_suite.names() if parity_suite.kind_of(name) in ("method", "base")):
        plan = parity_suite.load(name)
        met = [case for case in plan.cases(FEW) if case.kind == plan.layers[0]]
        for one in (*plan.configs, *plan.shapes):
            dtypes = {case.dtype for case in met if one in (case.config, case.shape)}
            assert "float32" in dtypes
            assert len(dtypes) > 1


def test_lora_of_convolutions_meets_most_configs_and_every_kind_of_layer_two_dtypes() -> None:
    plan = parity_suite.load("lora")
    cases = list(plan.cases(FEW))
    met = [config for config in plan.configs if any(c.config == config and "conv2d" in c.kind for c in cases)]
    assert len(met) > len(plan.configs) / 2
    for kind in plan.layers:
        dtypes = {case.dtype for case in cases if case.kind == kind}
        assert "float32" in dtypes
        assert len(dtypes) > 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("operation", "adamw8bit_step", "bitsandbytes-paged"),
        ("operation", "paged_states", "bitsandbytes-paged"),
        ("operation", "galore_step", "galore-torch"),
        ("operation", "lamb8bit_step", "bitsandbytes"),
        ("operation", "lion8bit_step", "bitsandbytes"),
        ("operation", "lorafa_step", "hf-peft"),
        ("operation", "loraplus_groups", "hf-peft"),
        ("operation", "loraplus_groups", "hf-peft-keywords"),
        ("operation", "riemannian_lora_step", "hf-peft"),
        ("operation", "galore_step", "galore-torch-8bit"),
        ("base", "nf4-dq", "torchao"),
        ("method", "pissa", "hf-peft"),
        ("method", "pissa", "hf-peft-reloaded"),
        ("method", "vera", "hf-peft-second"),
        ("method", "lora", "loralib-merging"),
        ("loader", "adapter_files", "hf-peft"),  # test_corpus compares the logits
    ],
)
def test_what_a_library_does_otherwise_is_what_is_known_of_it(kind: str, target: str, name: str) -> None:
    implementation = discover().find(kind, target, name)
    for module in implementation.requires:
        pytest.importorskip(module, reason=f"{module} comes with an extra")
    wide = checks.names_of_wide()  # as in the command, an entry for these must show only with --wide
    tried = suite_run.run(implementation, dtypes=("float32",))
    marked, _ = defects.explained(tried, defects.known())
    _, complaints = defects.explained([one for one in tried if one.check not in wide], defects.known())
    assert [one for one in marked if one.result.outcome is Outcome.FAIL and not one.defect] == []
    assert any(one.defect for one in marked)
    assert complaints == []


def test_each_source_of_a_check_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, parse = list[str](), ast.parse

    def counted(source: str, *arguments: Any, **options: Any) -> ast.AST:
        parsed.append(source)
        return parse(source, *arguments, **options)

    monkeypatch.setattr(ast, "parse", counted)
    for once in (defects.known, checks._docstrings_in, checks._declared_in):
        once.cache_clear()
    assert sum(len(one.checks) for one in defects.known()) > len(list(Path(*checks.__path__).glob("*.py")))
    assert parsed
    assert len(parsed) == len(set(parsed))


def test_the_checks_of_wide_are_known_without_torch() -> None:
    assert checks.names_of_wide() == {name for name, one in checks.every().items() if one.only_wide}
