"""A model that reads an adapted layer's weight instead of calling the layer: told with the layer and what may be adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from harness.assets.table import Source
from harness.measure.memory import PeakMeter
from harness.measure.phases import PhaseClock
from harness.records import AssetUse, Cell, Evaluation, Record, Status, Training
from harness.runner import worker
from harness.runner.life import Life
from harness.runner.work import Asset, TaskWork, Work
from harness.tasks import SYNTHETIC


def lived(folder: Path, targets: list[str], monkeypatch: pytest.MonkeyPatch) -> Record:
    """Live a Cell of LoRA on a small Mamba in this process."""
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(
        folder
    )
    cell = Cell(
        model="mamba", task=SYNTHETIC, method="lora", implementation="reference", config={"rank": 2, "targets": targets},
        dtype="float32", seed=0, training=Training(steps=2, batch=2, max_tokens=8),
        evaluation=Evaluation(items=0, latency=False),
    )  # fmt: skip
    use = AssetUse(name="mamba", source="folder:mamba")
    work = Work(
        run="r", folder=str(folder), attempt=1, cell=cell, data=None, device="cpu", launched=0.0,
        model=Asset(path=str(folder), source=Source(name="mamba", kind="causal", source="folder:mamba"), use=use),
        task=TaskWork(name=SYNTHETIC, spec={}, labels=2, test=0, shuffle_seed=0, use=use),
    )  # fmt: skip

    def prepare(work: Work, registry: Any, emit: Any, threads: int) -> tuple[Life, dict[str, object]]:
        meter = PeakMeter(torch.device("cpu"))
        return Life(work, registry, PhaseClock(meter, lambda _: None), meter, emit, baseline=0), {}

    monkeypatch.setattr(worker, "_prepare", prepare)
    return worker.attempt(work, lambda *_, **__: None)


@pytest.mark.parametrize("bypassed", ["dt_proj", "x_proj"])  # one as it evaluates, the other only as it trains
def test_a_layer_that_its_model_does_not_call(bypassed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = lived(tmp_path, ["in_proj", bypassed], monkeypatch)
    assert (record.status, record.because) == (
        Status.ERROR,
        f"the model reads the `weight` of backbone.layers.0.mixer.{bypassed} itself and does not call it: no adapter on it "
        "counts; name others as `targets`, of in_proj those that it calls",
    )
    assert lived(tmp_path, ["in_proj"], monkeypatch).status is Status.OK
