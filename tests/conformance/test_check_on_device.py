"""`check --device cuda`: the parity suites on another device, what an exception leaves, and a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cli import main
from harness.conformance.case_selection import CaseSelection
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome, DeviceLostError
from harness.errors import Exit
from harness.methods.registry import Implementation, implements
from support.repository import TESTS, TOP

_PASSES = {"pass", "skipped", "unsupported"}
_BRIEF = ("lora", "lora_linear", "nf4_dequantize", "paged_adamw")
_METHODS = ("adalora", "dora", "galore", "lora", "pissa", "qlora", "vera")
_OPERATIONS = (
    "adalora_importance", "adamw8bit_step", "dora_linear", "double_dequantize", "double_quantize", "dynamic_quantize",
    "galore8bit_step", "galore_step", "lora_experts", "lora_linear", "lora_mlp", "lora_qkv", "multi_lora_linear", "nf4",
    "nf4-dq", "nf4_dequantize", "nf4_linear", "nf4_lora_linear", "nf4_quantize", "paged_adamw", "paged_states",
    "vera_linear",
)  # fmt: skip
_NOT_FUSED = (
    "fp4_dequantize", "fp4_quantize", "frozen", "full", "lamb8bit_step", "lion8bit_step", "loha", "lokr", "lorafa_step",
    "loraplus_groups", "riemannian_lora_step",
)  # fmt: skip


@cache
def _on_pretended_device(*arguments: str) -> list[list[str]]:
    """Return the outcomes of checks in a process with a pretended GPU, as lists.

    A list holds the implementation, the target, the case, the check, the status and the detail of an outcome.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOP), str(TESTS)])}
    command = [sys.executable, "-m", "support.pretended_checks", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tried: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return tried


def _require_passes(name: str, targets: Sequence[str], *arguments: str) -> None:
    tried = [one[1:] for one in _on_pretended_device(*arguments, *targets) if one[0] == name]
    failed = [one for one in tried if one[3] not in _PASSES]
    assert not failed, "\n".join(f"{name} {check}, case {case}: {detail}" for _, case, check, _, detail in failed)
    assert {target for target, _, _, status, _ in tried if status == "pass"} == set(targets)


def test_no_check_lets_a_tensor_of_the_cpu_meet_one_of_the_device() -> None:
    _require_passes("fused", _BRIEF, "--planted", "--brief")


def test_a_check_on_a_device_finds_what_is_wrong_only_there() -> None:
    tried = _on_pretended_device("--planted", "--brief", *_BRIEF)
    found = {name: detail for name, *_, detail in tried if name != "fused"}
    assert "one device" in found["on-the-cpu"]
    assert "under autocast" in found["zero-under-autocast"]
    assert "draws random numbers" in found["draws-on-the-device"]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [("fused", _METHODS, ()), ("fused", _OPERATIONS, ("--brief",)), ("reference", _NOT_FUSED, ("--brief",))],
    ids=["methods", "operations", "reference"],
)
def test_no_check_of_any_target_lets_a_tensor_of_the_cpu_meet_one_of_the_device(
    name: str, targets: Sequence[str], options: tuple[str, ...]
) -> None:
    _require_passes(name, targets, f"--of={name}", *options)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cli.check_run.no_gpu", lambda: "no GPU")
    assert main(["check", "fused", "--op", "nf4_dequantize", "--device", "cuda"]) == Exit.INFRASTRUCTURE
    assert "no GPU" in capsys.readouterr().err


def test_it_applies_to_implementations_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--loop", "trl", "--device", "cuda"]) == Exit.USAGE
    assert "--device" in capsys.readouterr().err


def _raising() -> Implementation:
    @implements("nf4_dequantize", name="raises", kind="operation")
    def raises(**_: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    return raises


def test_an_exception_keeps_its_traceback() -> None:
    outcomes = suite_run.run(_raising(), dtypes=("float32",))
    failed = [one for one in outcomes if one.status.value == "fail"]
    assert failed
    assert all("in raises" in one.traceback for one in failed)
    assert all("illegal memory access" in one.traceback for one in failed)


def test_a_lost_gpu_ends_the_checks_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access, every later call would fail too, and be blamed on the wrong kernel."""

    def lost(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(suite_run, "call", _call_on_cpu(suite_run.call))
    found: list[CheckOutcome] = []
    with pytest.raises(DeviceLostError, match="accepts no more work"):
        suite_run.stream(_raising(), found.append, dtypes=("float32",), device=torch.device("cuda"))
    assert len(found) == 1


@pytest.mark.slow
def test_a_gpu_that_a_drawn_case_loses_ends_the_checks_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lost(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(suite_run, "call", _call_on_cpu(suite_run.call))
    monkeypatch.setattr(suite_run.sample, "fixed", lambda *_: [])
    found: list[CheckOutcome] = []
    drawn = CaseSelection(drawn=20)
    with pytest.raises(DeviceLostError, match="accepts no more work"):
        suite_run.stream(_raising(), found.append, breadth=drawn, dtypes=("float32",), device=torch.device("cuda"))
    assert len(found) == 1


def _call_on_cpu(real: Any) -> Any:
    return lambda implementation, plan, of, _: real(implementation, plan, of)
