"""`check PATH`: one adapter file, its findings and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.conformance.adapter_files import corpus
from harness.errors import Exit

BASES = corpus.folder() / "bases"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a copy of the plain adapter, beside no base."""
    return Path(shutil.copytree(corpus.folder() / "plain", tmp_path / "plain"))


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_file_of_the_corpus_conforms_to_the_base_that_its_config_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(corpus.folder() / "rslora"), "--json"]) == Exit.PASS
    found = document(capsys)
    assert found["base"] == str(BASES / "llama")
    assert found["findings"] == []
    assert found["features"] == ["plain", "rslora"]
    verdicts = {one["loader"]: one["verdict"] for one in found["loaders"]}
    assert verdicts["SGLang"] == "wrong"
    assert verdicts["hf-peft 0.21.2"] == verdicts["vLLM"] == "ok"


def test_the_text_names_findings_and_loaders(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = plain / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key] * torch.inf}, file)
    assert main(["check", str(file), "--base-model", str(BASES / "llama")]) == Exit.FAIL
    out = capsys.readouterr().out
    assert "not-finite" in out
    assert key in out
    assert "vLLM" in out


def test_without_a_base_the_file_is_judged_by_itself(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(plain)]) == Exit.PASS
    assert "base: none" in capsys.readouterr().out


def test_another_base_is_one_finding(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(plain), "--base-model", str(BASES / "gpt2"), "--json"]) == Exit.FAIL
    assert [one["kind"] for one in document(capsys)["findings"]] == ["other-base"]


def test_what_cannot_be_read_exits_with_2(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [str(plain / "none")],
        ["none.safetensors"],
        [str(plain), "--base-model", str(plain)],
        [str(plain), "--full"],
        [str(plain), "reference"],
        ["reference", "--base-model", str(BASES / "llama")],
    ):
        assert main(["check", *arguments]) == Exit.USAGE, arguments
        assert capsys.readouterr().err.count("hint:") == 1, arguments
    (plain / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    assert main(["check", str(plain)]) == Exit.USAGE
    assert "is not a safetensors file" in capsys.readouterr().err
