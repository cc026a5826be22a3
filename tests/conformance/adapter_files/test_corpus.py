"""The corpus of adapter files: what it holds, who agrees with it, and how far a wrong reading is from it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from harness.conformance import faults, parity_suite, self_test
from harness.conformance.adapter_files import corpus
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.adapter_files.subject import by_prompt, corpus_adapter
from harness.conformance.case_selection import FEW
from harness.conformance.comparison.tolerance_policies import carried_noise, exact
from harness.conformance.execution import suite_run
from harness.conformance.findings import defects
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.methods.implementations.hf_peft.loader import PeftLoader
from harness.methods.registry import Implementation, discover
from harness.records.check import Outcome

FAR = 1000
"""Smallest error of a wrong reading, as a multiple of the allowed error."""
FAULTS = [one for one in faults.every() if one.target == "adapter_files"]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script that makes the corpus."""
    spec = importlib.util.spec_from_file_location("make_corpus", corpus.folder() / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_corpus", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.nightly
def test_the_script_makes_the_committed_files(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "make_corpus", make)
    make.main(tmp_path)
    assert sorted(one.name for one in make.CORPUS) == corpus.names()
    committed = sorted(corpus.folder().glob("**/*.safetensors"))
    for path in committed:
        again, there = load_file(tmp_path / path.relative_to(corpus.folder())), load_file(path)
        if path.name != "expected.safetensors":
            assert exact(again, there).passed, path
            continue
        for key in there:  # another CPU may round a float64 sum otherwise
            assert carried_noise(
                {key: again[key].double()}, {key: there[key].double()}, {key: there[key]}, "float64"
            ).passed
    assert {path.relative_to(tmp_path) for path in tmp_path.glob("**/*.safetensors")} == {
        path.relative_to(corpus.folder()) for path in committed
    }


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in corpus.folder().rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.parametrize("name", corpus.names())
def test_every_adapter_changes_the_logits_far_above_the_tolerance(name: str) -> None:
    one = corpus_adapter(name)
    base = by_prompt(reference_logits(one.base, None, one.prompts))
    rounded = reference_logits(one.base, AdapterFile.read(one.folder), one.prompts, torch.float32)
    verdict = carried_noise(base, by_prompt(one.logits), by_prompt(rounded), "float32")
    assert verdict.ratio > FAR


@pytest.mark.parametrize("name", corpus.names())
def test_updates_have_both_signs_and_no_b_is_zero(name: str) -> None:
    for key, tensor in AdapterFile.read(corpus.folder() / name).tensors().items():
        if ".lora_" in key and "magnitude" not in key:
            assert bool((tensor > 0).any()), key
            assert bool((tensor < 0).any()), key


def logits_outcomes(loader: Implementation, *dtypes: str) -> list[CheckOutcome]:
    """Run the check `logits` alone with every adapter. tests/conformance/test_loader_checks.py has the other checks."""
    plan = parity_suite.load_plan("adapter_files").model_copy(update={"checks": ["logits"]})
    cases = [case for case in plan.cases(FEW) if not dtypes or case.dtype in dtypes]
    return [one for case in cases for one in suite_run.run_case(loader, plan, case)]


@pytest.mark.nightly
def test_hf_peft_agrees_with_every_file_or_has_a_known_defect() -> None:
    loader = discover(only=["hf-peft"]).find("loader", "adapter_files", "hf-peft")
    tried, complaints = defects.explained(
        logits_outcomes(loader, "float32"), [one for one in defects.known() if one.target == "adapter_files"]
    )
    assert [f"{one.case}: {one.result.detail}" for one in tried if one.status is CheckStatus.FAIL] == []
    assert complaints == []
    assert sorted({one.case for one in tried}) == corpus.names()


@pytest.mark.slow
def test_the_reference_agrees_with_every_file_in_every_dtype() -> None:
    loader = discover(only=["reference"]).find("loader", "adapter_files", "reference")
    wrong = [one for one in logits_outcomes(loader) if one.result.outcome is Outcome.FAIL]
    assert [f"{one.case} {one.dtype}: {one.result}" for one in wrong] == []


@pytest.mark.nightly
@pytest.mark.parametrize("fault", [one for one in FAULTS if one.expected == ("logits",)], ids=lambda one: one.name)
def test_a_wrong_reading_is_far_from_the_logits(fault: faults.Fault) -> None:
    plan = parity_suite.load_plan("adapter_files").model_copy(update={"checks": ["logits"]})
    (logits,) = suite_run.run_case(self_test._spoilt(fault), plan, fault.case.of_kind("loader"))
    assert logits.result.error is not None
    assert logits.result.error > FAR * (logits.result.allowed or 0)


def test_unmerging_that_leaves_a_layer_merged_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft unmerges by itself when the adapters are disabled, so the logits would not show it."""
    loader = PeftLoader(corpus.folder() / "bases" / "llama", "float32")
    loader.load(corpus.folder() / "plain", "one")
    loader.merge(["one"])
    monkeypatch.setattr(loader.model, "unmerge_adapter", lambda: None)
    with pytest.raises(RuntimeError, match="left a layer merged"):
        loader.unmerge()
