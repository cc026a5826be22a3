"""A model that reads an adapted layer's weight instead of calling the layer: told with the layer and what may be adapted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from harness.assets.table import Source
from harness.cell.cell_run import CellRun
from harness.cell.job import Asset, Job, JobTask
from harness.cell.measure.memory import PeakMeter
from harness.cell.measure.phases import PhaseClock
from harness.cli import main
from harness.memory_model import dry_step, isolated_step
from harness.records.record import AssetUse, Cell, Evaluation, Record, Status, Training
from harness.runner import worker
from harness.suites.schema import SYNTHETIC

MAMBA = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


def lived(folder: Path, targets: list[str], monkeypatch: pytest.MonkeyPatch) -> Record:
    """Live a Cell of LoRA on a small Mamba in this process."""
    MambaForCausalLM(MambaConfig(**MAMBA)).save_pretrained(folder)
    cell = asked(targets)
    use = AssetUse(name="mamba", source="folder:mamba")
    work = Job(
        run="r", folder=str(folder), attempt=1, cell=cell, data=None, device="cpu", launched=0.0,
        model=Asset(path=str(folder), source=Source(name="mamba", kind="causal", source="folder:mamba"), use=use),
        task=JobTask(name=SYNTHETIC, spec={}, labels=2, test=0, shuffle_seed=0, use=use),
    )  # fmt: skip

    def prepare(work: Job, registry: Any, emit: Any, threads: int) -> tuple[CellRun, dict[str, object]]:
        meter = PeakMeter(torch.device("cpu"))
        return CellRun(work, registry, PhaseClock(meter, lambda _: None), meter, emit, baseline_B=0), {}

    monkeypatch.setattr(worker, "_prepare", prepare)
    return worker.attempt(work, lambda *_, **__: None)


def asked(targets: list[str]) -> Cell:
    return Cell(
        model="mamba", task=SYNTHETIC, method="lora", implementation="reference", config={"rank": 2, "targets": targets},
        dtype="float32", seed=0, training=Training(steps=2, batch=2, max_tokens=8),
        evaluation=Evaluation(items=0, latency=False),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bypassed", ["dt_proj", "x_proj"])  # one as it evaluates, the other only as it trains
def test_a_layer_that_its_model_does_not_call(bypassed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = lived(tmp_path, ["in_proj", bypassed], monkeypatch)
    assert (record.status, record.because) == (
        Status.ERROR,
        f"the model reads the `weight` of backbone.layers.0.mixer.{bypassed} itself and does not call it: an adapter on it "
        "has no effect; name other `targets`: those of in_proj that the model calls",
    )


@pytest.mark.slow
def test_a_layer_that_its_model_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lived(tmp_path, ["in_proj"], monkeypatch).status is Status.OK


def test_a_step_without_data_tells_it_in_the_same_words() -> None:
    cell, config = asked(["in_proj", "dt_proj"]), MAMBA | {"model_type": "mamba"}
    assert isolated_step.peak(cell, config, "causal", dry_step.longest_batches(cell, "causal", 8)) == {
        "no_peak": "the model reads the `weight` of backbone.layers.0.mixer.dt_proj itself and does not call it: an adapter "
        "on it has no effect; name other `targets`: those of in_proj that the model calls"
    }


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_fit_says_that_such_a_row_is_not_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = MAMBA | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    words = ["fit", str(tmp_path), "--memory", "1GiB", "--method", "lora", "--base", "none", "--rank", "2"]
    assert main([*words, "--tokens", "8", "--target", "dt_proj"]) == 0
    said = capsys.readouterr().out
    assert "not possible:\n  lora: the model reads the `weight` of backbone.layers.0.mixer.dt_proj itself" in said
