"""`method: peft`: any method of HF peft by its adapter_config.json, and what can be said of it without a reference."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

# peft's BOFT imports this module, and with it setuptools. That fails after the standard library's distutils, which other
# tests import.
import torch.utils.cpp_extension
from torch import nn

from harness.analysis import failed_checks
from harness.cell.unreferenced_method import attached_layers
from harness.conformance import checks
from harness.conformance.case import Case
from harness.conformance.cell_gate import parity_gate
from harness.conformance.checks.unreferenced import nudged
from harness.conformance.comparison.observations import inference
from harness.conformance.subject import DTYPES, Original, Subject, configure
from harness.errors import Exit, ImplementationError, SuiteError, UsageError
from harness.methods import peft_schema
from harness.methods.implementations.hf_peft.any_config import any_method
from harness.methods.peft_config import KEY, NO_REFERENCE, PEFT, AdapterConfigField
from harness.records.record import CheckResult, Outcome, Status
from harness.suites import loader
from support.sandbox import ForkSandbox

LAYERS = ["first", "second"]
CONFIGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4}, "IA3": {"feedforward_modules": ["second"]}, "LOHA": {}, "LOKR": {}, "OFT": {}, "BOFT": {}, "HRA": {},
    "VBLORA": {"vector_length": 32}, "FOURIERFT": {"n_frequency": 50}, "LN_TUNING": {"target_modules": ["norm"]},
}  # fmt: skip
TRIED = [*((kind, "float32") for kind in CONFIGS), ("LOHA", "bfloat16"), ("OFT", "bfloat16")]
ELSEWHERE = {"VBLORA", "FOURIERFT"}  # whose start is not the base model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(64, 128), nn.LayerNorm(128)
            self.second = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))  # type: ignore[no-any-return]


def logits(model: Any) -> torch.Tensor:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y: torch.Tensor = model(x.to(next(p for name, p in model.named_parameters() if name.startswith("norm")).dtype))
    return y


def attached(kind: str, dtype: str = "float32", **keys: Any) -> tuple[Subject, Case]:
    model = Model().to(DTYPES[dtype]).eval()
    run = inference(model, logits)
    base_output, own, original = run(), list(model.parameters()), Original.of(model)
    config = configure("peft", {KEY: {"peft_type": kind, "target_modules": LAYERS, **CONFIGS.get(kind, {}), **keys}})
    adapted = any_method(model, config, torch.Generator().manual_seed(0))
    bases, _ = attached_layers(adapted, [])
    subject = Subject("peft", config, dtype, model, adapted, bases, own, original)  # type: ignore[arg-type]
    return subject, Case("init", run_model=run, base_output=base_output, forward=logits)


def gated(subject: Subject, case: Case) -> dict[str, CheckResult]:
    assert case.run_model is not None
    assert case.base_output is not None
    found = parity_gate.gate(subject, 0, case.run_model, case.base_output, forward=logits)
    return {"/".join(result.check.split("/")[1::2]): result for result in found}


@pytest.mark.parametrize(("kind", "dtype"), TRIED)
def test_methods_of_peft_pass_the_checks_without_a_reference(kind: str, dtype: str) -> None:
    subject, case = attached(kind, dtype)
    before = {name: t.detach().clone() for name, t in subject.adapted.tensors().items()}
    found = gated(subject, case)
    skipped = {name: result.detail for name, result in found.items() if result.outcome is Outcome.SKIPPED}
    assert skipped.pop("reference/init") == NO_REFERENCE
    assert set(skipped) == ({"start/init"} if kind in ELSEWHERE else set())
    assert [name for name, result in found.items() if result.outcome is Outcome.FAIL] == []
    assert {"base/init", "repeats/warm", "reached/warm", "reload/warm", "merge_itself/warm"} <= found.keys()
    assert all(torch.equal(t, before[name]) for name, t in subject.adapted.tensors().items())


def spoilt(check: str, subject: Subject, case: Case) -> CheckResult:
    return checks.every()[check](subject, dataclasses.replace(case, state="warm"))


def warmed(kind: str, **keys: Any) -> tuple[Subject, Case, Any]:
    subject, case = attached(kind, **keys)
    subject = nudged(subject, torch.Generator().manual_seed(5))
    return subject, case, subject.adapted.layers["first"]


def test_a_start_that_differs_from_the_base_is_detected() -> None:
    subject, case = attached("IA3")
    with torch.no_grad():
        subject.adapted.tensors()["second.ia3_l.default"].mul_(1.001)
    assert spoilt("start", subject, case).outcome is Outcome.FAIL


def test_a_base_changed_by_attach_is_detected() -> None:
    subject, case = attached("LOHA")
    subject.bases["first"].weight.data[0, 0] += 1e-3  # type: ignore[operator,index,union-attr]
    assert gated(subject, case)["base/init"].outcome is Outcome.FAIL


def test_noise_is_detected() -> None:
    subject, case, layer = warmed("LOHA")
    right = layer.forward
    layer.forward = lambda x: right(x) * (1 + torch.finfo(x.dtype).eps * (torch.rand_like(x[..., :1]) < 0.5))
    assert spoilt("repeats", subject, case).outcome is Outcome.FAIL


def test_a_weight_changed_by_a_forward_pass_is_detected() -> None:
    subject, case, layer = warmed("LOKR")
    right = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        layer.base_layer.weight.data[0, 0] += 1e-3
        return right(x)  # type: ignore[no-any-return]

    layer.forward = forward
    assert spoilt("untouched", subject, case).outcome is Outcome.FAIL


def test_an_unreachable_adapter_is_detected() -> None:
    subject, case, layer = warmed("IA3")
    layer.forward = layer.base_layer.forward
    result = spoilt("reached", subject, case)
    assert result.outcome is Outcome.FAIL
    assert "first.ia3_l.default gets no gradient" in result.detail


def test_an_incomplete_saved_adapter_is_detected() -> None:
    subject, case, layer = warmed("LORA")
    layer.scaling["default"] *= 2
    assert spoilt("reload", subject, case).outcome is Outcome.FAIL


@pytest.mark.parametrize("fault", ["does nothing", "adds twice", "does not unmerge"])
def test_a_wrong_merge_is_detected(fault: str) -> None:
    subject, case, _ = warmed("LOHA")

    class Wrong(type(subject.adapted)):  # type: ignore[misc]
        def merge(self) -> None:
            if fault != "does nothing":
                super().merge()
            if fault == "adds twice":
                layer = self.layers["first"]
                layer.base_layer.weight.data += layer.get_delta_weight("default")

        def unmerge(self) -> None:
            if fault == "adds twice":
                super().unmerge()

    subject.adapted.__class__ = Wrong
    result = spoilt("merge_itself", subject, case)
    assert result.outcome is Outcome.FAIL
    assert result.detail == ("after unmerging" if fault == "does not unmerge" else "after merging")


def test_errors_of_peft_are_reported_with_its_message() -> None:
    with pytest.raises(ImplementationError, match=r"peft refuses .*not found in the base model"):
        attached("LOHA", target_modules=["third"])
    with pytest.raises(ImplementationError, match=r"peft refuses .*positive integer value"):
        attached("LOHA", r=0)


def test_a_key_of_a_newer_peft_is_ignored_with_a_note() -> None:
    subject, _ = attached("IA3", of_the_future=3)
    assert "of_the_future" in " ".join(subject.adapted.notes)  # type: ignore[attr-defined]


def problems_of(config: dict[str, Any]) -> list[Any]:
    field = PEFT.fields[KEY]
    assert isinstance(field, AdapterConfigField)
    return list(field.problems(config))


def test_a_key_that_peft_would_ignore_is_a_mistake_of_the_suite() -> None:
    ((where, what, hint),) = problems_of({"peft_type": "LORA", "r": 4, "lora_alhpa": 7})
    assert where == ("lora_alhpa",)
    assert what == "has lora_alhpa, which the installed peft's LORA does not have and would ignore"
    assert hint == "did you mean `lora_alpha`?"
    assert problems_of({"peft_type": "LORA", "r": 4, "of_the_future": None}) == []  # a newer peft's, and unset


@pytest.mark.slow
def test_the_keys_are_those_of_peft() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert PEFT_TYPE_TO_CONFIG_MAPPING
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert peft_schema.keys_of(kind.value) == set(inspect.signature(config.__init__).parameters) - {"self"}, kind


def test_target_parameters_without_a_match_are_rejected() -> None:
    """peft trains what else the config names, without a word."""
    with pytest.raises(ImplementationError, match=r"`nope\.weight`, which matches no parameter"):
        attached("LORA", target_parameters=["nope.weight"])


def test_an_adapter_on_a_new_head_is_rejected() -> None:
    subject, _ = attached("IA3")
    with pytest.raises(UsageError, match=r"adapts the head \(second\)"):
        attached_layers(subject.adapted, ["second.weight"])


SUITE = """\
suite: dropped
title: Dropped in
matrix:
  - model: tiny-llama
    task: toy-sentiment
    implementation: hf-peft
    method: peft
    training: {steps: 3, batch: 4, max_tokens: 24}
    evaluation: {items: 4}
    config: {adapter_config: HERE}
"""
IA3 = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["v_proj", "down_proj"],
       "feedforward_modules": ["down_proj"], "inference_mode": True, "modules_to_save": None}  # fmt: skip


LORA = {"peft_type": "LORA", "target_modules": ["v_proj"]}


def suite(folder: Path, value: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(SUITE.replace("HERE", json.dumps(value)), encoding="utf-8")
    return path


def cell_id(folder: Path, value: Any) -> str:
    (cell,) = loader.load(suite(folder, value)).plan.cells
    assert cell.label == "tiny-llama peft ia3 [hf-peft]"
    return cell.cell_id


def test_a_cell_id_depends_on_the_content_of_the_file_not_on_its_path(tmp_path: Path) -> None:
    for name, content in (("one", IA3), ("two", IA3), ("three", {**IA3, "target_modules": ["v_proj"]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    one = cell_id(tmp_path, "./one/adapter_config.json")
    assert cell_id(tmp_path, "two") == cell_id(tmp_path, IA3) == one  # a folder, and the keys themselves
    assert cell_id(tmp_path, "./three/adapter_config.json") != one


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in IA3.items() if k != key}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("./nowhere.json", "nowhere.json cannot be read: No such file"),
        ("./broken.json", "is not JSON: Expecting property name enclosed in double quotes: line 2 column 1"),
        ("./list.json", "list.json is not a JSON object"),
        ("./nan.json", "`adapter_config` of peft (./nan.json) has x nan, which JSON cannot represent"),
        ("./infinite.json", "has x.1 inf, which JSON cannot represent"),
        ("./surrogate.json", "has half a surrogate pair in x"),
        ("./latin.json", "latin.json is not UTF-8"),
        ("./deep.json", "is not JSON: maximum recursion depth exceeded"),
        ("./zero\0.json", "is no path: it holds a zero byte"),
        ("~nobody-of-this-name/adapter_config.json", "is no path: Could not determine home directory"),
        (None, "`adapter_config` of peft is missing"),
        ({}, "has no `peft_type` (it is empty)"),
        ({**IA3, "task_type": ["CAUSAL_LM"]}, "has task_type ['CAUSAL_LM']; the harness has models for"),
        ({**IA3, "modules_to_save": 5}, "has modules_to_save 5, which is not a list of names"),
        ({**IA3, "modules_to_save": "score"}, "has modules_to_save 'score', which is not a list of names"),
        (7, "must be the path of an adapter_config.json, or its keys, got 7"),
        (without("peft_type"), "has no `peft_type`"),
        ({**IA3, "peft_type": "IA4"}, "has peft_type IA4, which the installed peft does not have"),
        ({**IA3, "peft_type": "XLORA"}, "has peft_type XLORA, which is not supported: it mixes trained adapters"),
        ({**IA3, "peft_type": "PROMPT_TUNING"}, "has num_virtual_tokens None; PROMPT_TUNING needs a whole number"),
        ({**LORA, "arrow_config": {"top_k": 1}}, "has arrow_config, which is not supported: it mixes trained adapters"),
        (
            {**LORA, "init_lora_weights": "eva"},
            "has init_lora_weights eva, which is not supported: it requires texts",
        ),
        ({**LORA, "init_lora_weights": "lora_ga"}, "not supported: it requires gradients before training"),
        (
            {**LORA, "init_lora_weights": "pissa_niter_4"},
            "pissa_niter, which is not supported: its fast SVD draws new random numbers",
        ),
        ({**IA3, "task_type": "TOKEN_CLS"}, "has task_type TOKEN_CLS; the harness has models for CAUSAL_LM, SEQ_CLS"),
        ({**IA3, "task_type": "SEQ_CLS"}, "has task_type SEQ_CLS, and the model is of the kind `causal`"),
        ({**IA3, "modules_to_save": ["embed_tokens"]}, "has modules_to_save embed_tokens"),
    ],
)
def test_mistakes_are_found_when_the_suite_is_read(tmp_path: Path, value: Any, says: str) -> None:
    (tmp_path / "broken.json").write_text("{\n", encoding="utf-8")
    (tmp_path / "nan.json").write_text('{"peft_type": "IA3", "x": NaN}', encoding="utf-8")
    (tmp_path / "infinite.json").write_text('{"peft_type": "IA3", "x": [1, 1e999]}', encoding="utf-8")
    (tmp_path / "list.json").write_text('["IA3"]', encoding="utf-8")
    (tmp_path / "latin.json").write_bytes(b'{"peft_type": "\xe9"}')
    (tmp_path / "surrogate.json").write_text('{"peft_type": "IA3", "x": "\\ud800"}', encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(suite(tmp_path, value))
    assert says in str(caught.value)
    assert "suite.yaml:10: " in str(caught.value)


# For each mistake: the hint, and the keys after following it.
MENDS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"peft_type": None}, 'add it, e.g. "peft_type": "LORA"', {"peft_type": "LORA"}),
    ({"peft_type": "IA4"}, "did you mean `IA3`?", {"peft_type": "IA3"}),
    ({"peft_type": "lora"}, "did you mean `LORA`?", {"peft_type": "LORA"}),
    ({"peft_type": "XLORA"}, "write another: PROMPT_TUNING, ", {"peft_type": "VERA"}),
    ({"peft_type": "P_TUNING"}, 'write e.g. "num_virtual_tokens": 8', {"peft_type": "P_TUNING", "num_virtual_tokens": 8}),
    ({"arrow_config": {"top_k": 1}}, 'or write "arrow_config": null', {"arrow_config": None}),
    ({"init_lora_weights": "eva"}, 'write "init_lora_weights": true', {"init_lora_weights": True}),
    ({"init_lora_weights": "pissa_niter_4"}, 'write "init_lora_weights": "pissa"', {"init_lora_weights": "pissa"}),
    ({"task_type": "TOKEN_CLS"}, "write one of these, or take `task_type` out", {}),
    ({"task_type": "SEQ_CLS"}, 'write "task_type": "CAUSAL_LM", or take another model than', {"task_type": "CAUSAL_LM"}),
    ({"modules_to_save": "score"}, 'or write "modules_to_save": null', {"modules_to_save": None}),
    ({"modules_to_save": ["lm_head", "score"]}, "take lm_head out of", {"modules_to_save": ["score"]}),
    ({"lora_alpha": float("inf")}, "write a finite number", {"lora_alpha": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "hint", "right"), MENDS, ids=lambda value: str(value)[:40])
def test_following_a_hint_fixes_the_config(
    tmp_path: Path, wrong: dict[str, Any], hint: str, right: dict[str, Any]
) -> None:
    others = {} if "peft_type" in wrong else LORA  # whose keys another type does not have
    (tmp_path / "wrong.json").write_text(json.dumps({**others, **wrong}), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(suite(tmp_path, "./wrong.json"))
    (problem,) = caught.value.problems
    assert hint in problem.hint
    assert loader.load(suite(tmp_path, {**others, **right})).entries


def test_all_mistakes_of_a_config_are_reported_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"peft_type": "PREFIX_TUNING", "task_type": "SEQ_CLS"}), encoding="utf-8"
    )
    configs = """
      adapter_config:
        - {peft_type: lorra, arrow_config: {top_k: 1}, init_lora_weights: eva,
           modules_to_save: 5, lora_alpha: .nan}
        - ./config.json
        - ./nowhere
        - {peft_type: CARTRIDGE, num_virtual_tokens: 4,
           task_type: SEQ_CLS}
"""
    path = suite(tmp_path, "HERE")
    text = path.read_text(encoding="utf-8").replace('{adapter_config: "HERE"}', configs)
    path.write_text(text.replace("max_tokens: 24", "max_tokens: 24, checkpointing: true"), encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    messages = [
        (int(p.where.rpartition(":")[2]), p.what.removeprefix("`adapter_config` of peft"))
        for p in caught.value.problems
    ]
    expected = [
        (8, "`checkpointing` is true, but CARTRIDGE"), (8, "`checkpointing` is true, but PREFIX_TUNING"),
        (12, " has arrow_config"), (12, " has init_lora_weights eva"), (12, " has peft_type lorra"),
        (13, " has lora_alpha nan"), (13, " has modules_to_save 5"),
        (14, " (./config.json) has num_virtual_tokens None"), (14, " (./config.json) has task_type SEQ_CLS, and the model"),
        (15, ": ./nowhere cannot be read"), (17, " has task_type SEQ_CLS, and the model"),
    ]  # fmt: skip
    assert [(line, what[: len(start)]) for (line, what), (_, start) in zip(messages, expected, strict=True)] == expected


def test_a_model_that_is_named_directly_has_a_kind_too(tmp_path: Path) -> None:
    path = suite(tmp_path, {**IA3, "task_type": "SEQ_CLS"})
    text = path.read_text(encoding="utf-8").replace("tiny-llama", f'"org/model@{"0" * 40}"')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError, match="has task_type SEQ_CLS, and the model is of the kind `causal`"):
        loader.load(path)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("base: {quantization: nf4, implementation: fused}", "peft needs a base that is not quantised"),
        (
            "base: {quantization: nf4, implementation: fused}\n    method: galore\n    config: {rank: 2}",
            "base nf4 has frozen weights in 4 bits, but galore trains the weights",
        ),
        (
            "method: lora\n    config: {rank: [2, 3], init: orthogonal}",
            "divides the rank into halves, but `rank` is 3",
        ),
    ],
)
def test_impossible_combinations(tmp_path: Path, more: str, says: str) -> None:
    path = suite(tmp_path, IA3)
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.strip().partition(":")[0] in {part.strip().partition(":")[0] for part in more.splitlines()}:
            text = text.replace(f"{line}\n", "")
    path.write_text(text + f"    {more}\n", encoding="utf-8")
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    assert says in str(caught.value)


def test_the_types_are_the_installed_pefts() -> None:
    peft = pytest.importorskip("peft", reason="compares with peft")
    assert set(peft_schema.peft_types()) == {one.value for one in peft.PeftType}


def test_a_run_completes_and_reports_no_time(fork_sandbox: ForkSandbox, tmp_path: Path) -> None:
    finished = fork_sandbox.command("run", str(suite(tmp_path, IA3)), "--out", "run")
    assert finished.code == Exit.PASS, finished.err
    (record,) = fork_sandbox.read().records
    assert record.status is Status.OK
    assert {path.rpartition(".")[2] for path in record.layers} == {"v_proj", "down_proj"}
    assert record.measurements is not None
    assert record.measurements.training is not None
    assert record.measurements.training.step_seconds
    assert failed_checks.no_speed(record) == f"no speed without parity: {NO_REFERENCE}"
    assert "ok, no reference" in finished.out
    assert "the only measured Cell conforms, without a reference to compare with" in finished.out
    passed = {check.check.split("/")[1] for check in record.checks if check.outcome is Outcome.PASS}
    assert passed >= {"base", "reached", "frozen", "moved"}
