"""`check PATH`: one adapter file, its findings and exit codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import adapter as adapter_command
from harness.cli import main
from harness.conformance.adapter_files import corpus, loader_logits, loader_worker, subject
from harness.conformance.adapter_files.loader_protocol import (
    Compared,
    LoaderBegun,
    LoaderEvent,
    LoaderLogits,
    LoaderTask,
)
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.adapter_files.subject import corpus_adapter
from harness.conformance.execution.worker_protocol import Died
from harness.errors import Exit
from harness.methods.base_model import logits as logits_of
from harness.methods.implementations.hf_peft.loader import PeftLoader
from harness.process import worker_pool

pytestmark = pytest.mark.usefixtures("forks")
BASES = corpus.folder() / "bases"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a copy of the plain adapter, beside no base."""
    return Path(shutil.copytree(corpus.folder() / "plain", tmp_path / "plain"))


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_logits_of_hf_peft_are_compared_with_the_reference(
    plain: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, junit = ["--base-model", str(BASES / "llama")], tmp_path / "check.xml"
    assert main(["check", str(plain), *base, "--json", "--junit", str(junit)]) == Exit.PASS
    out, err = capfd.readouterr()
    (logits,) = json.loads(out)["logits"]
    assert (logits["loader"], logits["verdict"]) == ("hf-peft", "agrees")
    assert 0 < logits["share"] <= 1
    assert "Failed to load" not in err
    assert "_pytree" not in err
    suite = ET.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")
    assert main(["check", str(plain), "reference", "hf-peft", *base]) == Exit.PASS
    assert "reference  agrees" in capfd.readouterr().out


@pytest.mark.slow
def test_a_loader_that_computes_other_logits_fails(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, junit = ["--base-model", str(BASES / "llama")], tmp_path / "check.xml"
    monkeypatch.setattr(PeftLoader, "load", lambda self, folder, name: None)
    monkeypatch.setattr(PeftLoader, "logits", lambda self, prompts, name: logits_of(self.model, prompts))
    assert main(["check", str(plain), *base, "--json", "--junit", str(junit)]) == Exit.FAIL
    (logits,) = document(capsys)["logits"]
    assert logits["verdict"] == "differs"
    assert logits["largest"] > 0
    assert ET.parse(junit).getroot()[0].get("failures") == "1"
    monkeypatch.setattr(PeftLoader, "load", lambda self, folder, name: 1 / 0)
    assert main(["check", str(plain), *base, "--json"]) == Exit.FAIL
    (logits,) = document(capsys)["logits"]
    assert logits["verdict"] == "raises"
    assert "ZeroDivisionError" in logits["detail"]


_LOADERS = """
import os, subprocess, time
from harness import implements
from harness.methods.reference_loader import ReferenceLoader

def crash(base, dtype):
    os._exit(3)

def hang(base, dtype):
    time.sleep(600)

def print_much(base, dtype):
    print("all is well: forged")
    os.write(1, b"forged too")
    return ReferenceLoader(base, dtype)

def leave_a_process(base, dtype):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    return ReferenceLoader(base, dtype)

def answer_nonsense(base, dtype):
    loader = ReferenceLoader(base, dtype)
    loader.logits = lambda prompts, name: "42"
    return loader

def loaders():
    for one in (crash, hang, print_much, leave_a_process, answer_nonsense):
        yield implements("adapter_files", name=one.__name__)(one)
"""


@pytest.mark.slow
def test_a_loader_that_hangs_crashes_or_prints_costs_only_its_own_row(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "site" / "odd-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[harness.implementations]\nodd = odd_loaders:loaders\n", encoding="utf-8")
    (info.parent / "odd_loaders.py").write_text(_LOADERS, encoding="utf-8")
    monkeypatch.syspath_prepend(info.parent)
    monkeypatch.setattr(worker_pool, "_GRACE_S", 1.0)
    names = ["crash", "hang", "print_much", "answer_nonsense", "reference", "leave_a_process"]
    arguments = [str(plain), *names, "--base-model", str(BASES / "llama"), "--patience", "2", "--json"]
    assert main(["check", *arguments]) == Exit.FAIL
    out, err = capfd.readouterr()
    found = {one["loader"]: one for one in json.loads(out)["logits"]}
    assert list(found) == names
    assert {name: one["verdict"] for name, one in found.items()} == {
        "crash": "raises", "hang": "raises", "print_much": "agrees", "answer_nonsense": "raises", "reference": "agrees",
        "leave_a_process": "agrees",
    }  # fmt: skip
    assert "exit code 3" in found["crash"]["detail"]
    assert "no result for 2 s; killed" in found["hang"]["detail"]
    assert "logits returned str" in found["answer_nonsense"]["detail"]
    assert "after the logits of print_much, answer_nonsense, reference, leave_a_process were compared" in err
    assert "left a process behind: sleep" in err


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_unexpected_error_of_the_reference_is_no_fault_of_the_file_or_the_loader(
    plain: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any) -> Any:
        if dtype in given or dtype is torch.float64:
            raise KeyError("no such layer")
        return reference_logits(*given)

    for module in (loader_worker, subject):
        monkeypatch.setattr(module, "reference_logits", broken)
    assert main(["check", str(plain), "reference", "--base-model", str(BASES / "llama"), "--json"]) == Exit.PASS
    out, err = capfd.readouterr()
    (logits,) = json.loads(out)["logits"]
    assert logits["verdict"] == "not compared"
    assert "raised KeyError: 'no such layer'; this is a defect of peft-harness" in logits["detail"]
    assert "please report it with the traceback on stderr and adapter_config.json" in logits["detail"]
    assert "patience" not in logits["detail"]
    assert "in broken" in err


def test_a_worker_that_dies_after_an_answer_costs_no_loader_its_result(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def events(pool: object, task: LoaderTask, patience: float) -> Iterator[LoaderEvent]:
        names = [name for name, _ in task.loaders]
        asked.append(names)
        yield LoaderBegun(begin=names[0])
        yield Compared(result=LoaderLogits(loader=names[0], verdict="agrees"))
        yield Died(died="the process died of SIGKILL")

    monkeypatch.setattr(loader_logits, "loader_events", events)
    loaders = ["reference", "hf-peft"]
    assert main(["check", str(plain), *loaders, "--base-model", str(BASES / "llama"), "--json"]) == Exit.PASS
    out, err = capsys.readouterr()
    found = {one["loader"]: one["verdict"] for one in json.loads(out)["logits"]}
    assert found == {"reference": "agrees", "hf-peft": "agrees"}
    assert all(f"after the logits of {name} were compared: the process died of SIGKILL" in err for name in loaders)
    assert asked == [["reference", "hf-peft"], ["hf-peft"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "verdict", "defect"),
    [
        ("experts_by_name_rslora", "differs", "peft-experts-by-name-rslora"),
        ("experts_by_name_rank_pattern", "raises", "peft-experts-by-name-rank-pattern"),
        ("dora", "differs", "peft-dora-zero-row"),
    ],
)
def test_a_known_defect_of_the_loader_is_named(
    name: str, verdict: str, defect: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(corpus.folder() / name, tmp_path / "mine"))
    base = Path(shutil.copytree(corpus_adapter(name).base, tmp_path / "base"))
    if name == "dora":
        weights = load_file(base / "model.safetensors")
        weights["model.layers.0.self_attn.o_proj.weight"][3] = 0
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"][3] = 0
        save_file(tensors, folder / "adapter_model.safetensors")
    arguments = ["check", str(folder), "--base-model", str(base)]
    assert main([*arguments, "--json"]) == Exit.FAIL
    (logits,) = document(capsys)["logits"]
    assert (logits["verdict"], logits["defect"]) == (verdict, defect)
    assert main(arguments) == Exit.FAIL
    assert f"known defect {defect} (`peft-harness explain {defect}`)" in capsys.readouterr().out


def test_logits_that_cannot_be_compared_have_a_reason(
    plain: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(BASES / "llama", tmp_path / "base"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert main(["check", str(plain), "--base-model", str(base), "--json"]) == Exit.PASS
    (logits,) = document(capsys)["logits"]
    assert logits["verdict"] == "not compared"
    assert "the weights of the base cannot be read" in logits["detail"]


def test_without_a_base_the_file_is_judged_by_itself(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(plain)]) == Exit.PASS
    assert "base: none" in capsys.readouterr().out


def test_another_base_is_one_finding(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(plain), "--base-model", str(BASES / "gpt2"), "--json"]) == Exit.FAIL
    assert [one["kind"] for one in document(capsys)["findings"]] == ["other-base"]


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"architectures": ["NoSuch"], "model_type": "nope"}],
    ids=str,
)
def test_a_config_of_a_base_that_means_nothing_is_one_message(
    plain: Path, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(BASES / "llama", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | change
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["check", str(plain), "--base-model", str(base)]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert (out, err.count("hint:")) == ("", 1)


def test_a_folder_without_the_right_to_read_it_is_one_message(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert main(["check", str(plain)]) == Exit.USAGE
    assert "cannot be read (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ({"target_modules": None}, "not-compared", Exit.NOTHING_COMPARED),
        ({"init_lora_weights": "pissa"}, "unsupported", Exit.NOTHING_COMPARED),
        ({"exclude_modules": "model.*"}, "no-target", Exit.FAIL),
        ({"r": None}, "null", Exit.FAIL),
    ],
    ids=str,
)
def test_a_config_that_gives_nothing_to_compare_is_no_pass(
    plain: Path, change: dict[str, Any], kind: str, code: Exit, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((plain / "adapter_config.json").read_text(encoding="utf-8")) | change
    (plain / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["check", str(plain), "--base-model", str(BASES / "llama"), "--json"]) == code
    found = document(capsys)
    assert kind in {one["kind"] for one in found["findings"]}
    assert "other-base" not in {one["kind"] for one in found["findings"]}
    assert "agrees" not in {one["verdict"] for one in found["logits"]}


def test_findings_of_one_kind_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(corpus.folder() / "dora", tmp_path / "mine"))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) | {"use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = ["check", str(folder), "--base-model", str(BASES / "llama")]
    assert main([*arguments, "--json"]) == Exit.FAIL
    unmatched = [one for one in document(capsys)["findings"] if one["kind"] == "unmatched-key"]
    assert main(arguments) == Exit.FAIL
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unmatched-key")]
    assert f"and {len(unmatched) - 1} more: {unmatched[1]['where']}, " in line


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "pipeline", "logging", "PreTrainedModel", 5])
def test_a_mapping_to_what_is_no_model_is_one_message(
    plain: Path, name: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = plain / "adapter_config.json"
    change = {"task_type": None, "auto_mapping": {"base_model_class": name}}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert main(["check", str(plain), "--base-model", str(BASES / "llama")]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert (out, err.count("hint:")) == ("", 1)
    assert f"{file}: base_model_class in auto_mapping is {name!r}" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ClassOfAnotherLibrary"])
def test_a_mapping_to_a_model_is_judged(plain: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = plain / "adapter_config.json"
    change = {"task_type": None, "auto_mapping": {"base_model_class": name}}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert main(["check", str(plain), "--base-model", str(BASES / "llama"), "--json"]) == Exit.PASS
    assert document(capsys)["base_class"] == "LlamaForCausalLM"


def test_what_cannot_be_read_exits_with_2(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [str(plain / "none")],
        ["none.safetensors"],
        [str(plain), "--base-model", str(plain)],
        [str(plain), "--full"],
        [str(plain), "hf-peft"],
        [str(plain), "hf-pet", "--base-model", str(BASES / "llama")],
        [str(plain), str(plain)],
        [str(plain), "--html", "page.html"],
        ["reference", "--base-model", str(BASES / "llama")],
    ):
        assert main(["check", *arguments]) == Exit.USAGE, arguments
        assert capsys.readouterr().err.count("hint:") == 1, arguments
    (plain / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    assert main(["check", str(plain)]) == Exit.USAGE
    assert "is not a safetensors file" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_regular_file_is_not_waited_for(plain: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (plain / name).unlink()
    os.mkfifo(plain / name)
    assert main(["check", str(plain)]) == Exit.USAGE
    assert f"{name}: is no regular file" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers of CPU time")
def test_a_pattern_that_backtracks_without_end_is_one_message(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter_command, "_JUDGE_S", 0.5)
    path = plain / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"target_modules": "(([a-z._0-9]+)+)+!"}
    path.write_text(json.dumps(config), encoding="utf-8")
    handler = signal.getsignal(signal.SIGVTALRM)
    assert main(["check", str(plain), "--base-model", str(BASES / "llama")]) == Exit.USAGE
    assert "may backtrack without end" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGVTALRM) is handler


def test_the_config_alone_is_not_taken_for_the_weights(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(plain / "adapter_config.json")]) == Exit.USAGE
    assert "is the adapter's config, not its weights" in capsys.readouterr().err
