"""`check --device cuda`: the parity suites on another device, what an exception leaves, and a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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

_ON_PRETENDED = """
import collections, json, sys
import torch
torch.set_num_threads(1)
from harness.conformance.comparison import observations
from harness.conformance.execution import suite_run
from harness.methods.registry import discover
from support.pretend_gpu import pretended
observations.strided_copy = lambda x: x.detach().clone()  # the pretended device has no storage
found = {}
registry = discover(only=["fused"])
with pretended() as device:
    for kind, target in (("operation", "nf4_dequantize"), ("operation", "lora_linear"), ("method", "lora")):
        tried = []
        suite_run.stream(registry.find(kind, target, "fused"), tried.append, dtypes=("float32",), device=device)
        found[target] = [(one.status.value, one.result.detail) for one in tried]
print(json.dumps(found))
"""


@pytest.mark.nightly
def test_no_check_lets_a_tensor_of_the_cpu_meet_one_of_the_device() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOP), str(TESTS)])}
    command = [sys.executable, "-c", _ON_PRETENDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for target, tried in found.items():
        assert [detail for _, detail in tried if "one device" in detail] == [], target
        assert sum(status == "pass" for status, _ in tried) > 50, target
    assert {status for status, _ in found["nf4_dequantize"]} <= {"pass", "skipped"}
    assert {status for status, _ in found["lora_linear"]} == {"pass"}


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
