"""How a Cell fails is told by what went wrong: whose memory, how much was asked for, which model, in which order."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.assets import fetch, table
from harness.cell.job import Job
from harness.cell.training import model
from harness.cli import main
from harness.errors import AssetError, Exit
from harness.methods.registry import Registry, implements
from harness.process.out_of_memory import Shortage, shortage
from harness.records import store
from harness.records.record import Cell, Evaluation, Record, Status, Training
from harness.runner import attempt as attempts
from harness.runner import worker
from harness.suites import loader
from support import recorded_run
from support.sandbox import Sandbox

# As torch's allocator of CUDA says it.
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.27 GiB is free. "
    "Including non-PyTorch memory, this process has 77.83 GiB memory in use."
)


def numpy_error() -> Exception:
    try:
        np.empty(2**50, dtype=np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError("a pebibyte was given")


def torch_error() -> Exception:
    try:
        torch.empty(2**50, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("a pebibyte was given")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError(CUDA), Shortage("device", 5 * 2**29)),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes."), Shortage("device", 512)),
        (torch.OutOfMemoryError("no words"), Shortage("device")),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), Shortage("device")),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), Shortage("device")),
        (torch_error(), Shortage("host", 2**50)),
        (numpy_error(), Shortage("host", 2**50)),
        (MemoryError(), Shortage("host")),
        (RuntimeError("std::bad_alloc"), Shortage("host")),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), Shortage("host")),
        (RuntimeError("unable to mmap 7 bytes from file <w>: Cannot allocate memory (12)"), Shortage("host")),
        (RuntimeError("Error while mapping: Cannot allocate memory (os error 12)"), Shortage("host")),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), None),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), None),
    ],
)
def test_every_allocator_has_words_of_its_own(error: Exception, found: Shortage | None) -> None:
    assert shortage(error) == found


def work_of(name: str) -> Job:
    budget: Any = {"training": Training(steps=1), "evaluation": Evaluation(items=1)}
    source = table.resolve("toy-sentiment", loader.load("smoke").sources, Path())
    asset = {"path": "unused", "source": source, "use": fetch.asset_use(source)}
    task = {"name": "toy", "spec": {}, "labels": 2, "test": 1, "shuffle_seed": 0, "use": fetch.asset_use(source)}
    return Job.model_validate(
        {"run": "r", "folder": "run", "attempt": 1, "model": asset, "data": asset, "task": task, "device": "cpu",
         "launched": 0.0, "cell": Cell(model="m", task="t", method="lora", implementation=name, **budget)}
    )  # fmt: skip


def attempt(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Record:
    """Live a Cell in this process, whose life ends with an error as it begins."""

    @implements("lora", name="ends")
    def ends(*_: Any) -> None: ...

    def prepare(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(worker.worker_imports, "registry", lambda cell: Registry((ends,)))
    monkeypatch.setattr(worker, "_import_all", lambda *_: "")
    monkeypatch.setattr(worker, "_prepare", prepare)
    return worker.attempt(work_of("ends"), lambda *_, **__: None)


def test_a_gpu_that_is_full_is_an_outcome_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    record = attempt(monkeypatch, torch.OutOfMemoryError(CUDA))
    assert (record.status, record.measurements) == (Status.OOM, None)
    assert record.because.startswith("the device's memory ran out: CUDA out of memory. Tried to allocate 2.50 GiB")
    assert record.failure is not None
    assert (record.failure.kind, record.failure.requested_B) == ("OutOfMemoryError", 5 * 2**29)


def test_a_kernel_that_kills_for_memory_is_told_from_any_other_killer(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sandbox.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(sandbox.folder / "plugin")
    monkeypatch.chdir(sandbox.folder)
    monkeypatch.setattr(attempts.KernelKills, "killed", lambda *_, **__: True)
    suite = sandbox.suite("{implementation: [killed, leaves]}")
    assert main(["run", suite, "--out", "run"]) == Exit.INFRASTRUCTURE
    ends = {r.cell.implementation: (r.status, r.because) for r in sandbox.read().records}
    assert ends["killed"] == (Status.OOM, "the kernel killed the worker: the host's memory ran out")
    assert ends["leaves"][0] is Status.LOST  # it ended by itself, whatever the kernel did


@pytest.mark.parametrize("spoil", ["weights", "config", "unknown"])
def test_a_model_that_cannot_be_read_is_named_with_its_hint(spoil: str, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights, described = tmp_path / "model.safetensors", tmp_path / "config.json"
    if spoil == "weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif spoil == "config":
        described.write_text(described.read_text()[:-9])
    else:
        described.write_text(described.read_text().replace('"llama"', '"of-tomorrow"'))
    with pytest.raises(AssetError) as caught:
        model.load(tmp_path, "causal", 2, torch.float32, torch.device("cpu"), 0)
    assert str(caught.value).startswith(f"{tmp_path}: the model cannot be read: ")
    assert re.search("\n  hint: copy or fetch its folder again", str(caught.value))


def test_memory_that_ends_while_a_model_is_read_is_no_unreadable_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def exhausted(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", exhausted)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        model.load(tmp_path, "causal", 2, torch.float32, torch.device("cpu"), 0)


def test_a_clock_that_is_set_back_between_attempts_does_not_change_their_order(tmp_path: Path) -> None:
    run = recorded_run.write_run(tmp_path / "run")
    first = run.records[0]
    folder = store.RunFolder(run.path)
    folder.reopen()
    earlier = recorded_run.failed(first, Status.OOM, attempt=2).model_copy(update={"started": "2001-01-01T00:00:00Z"})
    assert earlier.started < first.started
    folder.write_record(earlier)
    again = store.read_run(run.path)
    assert again.latest()[first.cell_id].attempt == 2
    assert store.RunFolder(run.path).next_attempt(first.cell_id) == 3
