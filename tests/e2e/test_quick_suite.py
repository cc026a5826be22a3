"""The headline of the quick suite, on its real pretrained models and data, through the command a user types."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import cache_folder
from harness.records import store
from harness.records.record import Record, Status
from harness.suites import loader
from support.once import once
from support.sandbox import make_fork_sandbox

pytestmark = pytest.mark.real
CHEAP = "id=head,id=lora-r8-nf4,implementation=reference"
OTHERS = "id=head,id=lora-r8,id=zero-shot,implementation=reference"
FEWER = {
    "steps: 72": "steps: 40", "items: 1000": "items: 400", "items: 200, batch: 20": "items: 100, batch: 20",
    "id: head\n": "id: head\n        latency: never\n",
    "id: zero-shot\n": "id: zero-shot\n        latency: never\n",
    "id: lora-r8-nf4\n": "id: lora-r8-nf4\n        latency: never\n        training: {steps: 8, warmup: 2}\n"
                         "        evaluation: {items: 50}\n",
}  # fmt: skip


def fewer(name: str, asked: str, tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """Run these Cells of the quick suite with fewer steps and reviews, once for all workers."""

    def make(folder: Path) -> str:
        text = (loader.data_folder("suites") / "quick.yaml").read_text(encoding="utf-8")
        for old, new in FEWER.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "fewer.yaml").write_text(text, encoding="utf-8")
        return (
            make_fork_sandbox(folder, cache_folder.root())
            .command("run", "fewer.yaml", "--only", asked, "--out", "run")
            .err
        )

    folder, printed = once(tmp_path_factory, name, make)
    assert (folder / "run").is_dir(), printed
    return store.read_run(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return fewer("real", CHEAP, tmp_path_factory)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return fewer("others", OTHERS, tmp_path_factory)


def named(run: store.Run, **facts: object) -> Record:
    (found,) = (
        record
        for record in run.latest().values()
        if all(getattr(record.cell, key) == value for key, value in facts.items() if key != "quantization")
        and record.cell.base.quantization == facts.get("quantization", "none")
    )
    return found


def test_every_cell_passes_its_gate_and_is_measured(run: store.Run) -> None:
    assert {record.cell.label: record.because for record in run.latest().values()} == {
        record.cell.label: "" for record in run.latest().values()
    }
    assert len(run.latest()) == 2
    assert all(record.status is Status.OK for record in run.records)


@pytest.mark.nightly
def test_lora_beats_the_head_alone_by_more_than_their_intervals(others: store.Run) -> None:
    lora = named(others, method="lora").measurements
    head = named(others, method="frozen", model="minilm-l6").measurements
    assert lora is not None
    assert lora.accuracy is not None
    assert head is not None
    assert head.accuracy is not None
    assert lora.accuracy.low > head.accuracy.high


def test_nf4_holds_the_base_in_fewer_bytes_and_is_checked_code_by_code(run: store.Run) -> None:
    packed = named(run, method="lora", quantization="nf4")
    dense = named(run, method="frozen", model="minilm-l6")
    assert packed.measurements is not None
    assert dense.measurements is not None
    assert packed.measurements.memory.weights_B < dense.measurements.memory.weights_B
    assert "lora/codes/float32/init" in {check.check for check in packed.checks}


@pytest.mark.nightly
def test_zero_shot_is_scored_item_by_item_through_lm_eval(others: store.Run) -> None:
    record = named(others, model="smollm2-135m-instruct")
    assert record.measurements is not None
    accuracy = record.measurements.accuracy
    assert accuracy is not None
    assert accuracy.scored_by.startswith("lm-eval ")
    assert len({item.id for item in accuracy.items}) == record.cell.evaluation.items
    # A model that reads is far from the coin toss that a wrong prompt or a wrong answer position gives.
    assert accuracy.low > 0.5


def test_the_report_is_one_page_that_names_every_record(run: store.Run) -> None:
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert all(record.cell_id in page for record in run.records)
    assert not [scheme for scheme in ('src="http', 'href="http') if scheme in page]


def test_the_run_stays_in_its_folder(run: store.Run) -> None:
    assert {p.name for p in Path(run.path).iterdir()} == {
        "run.json",
        "cells",
        "logs",
        "footer.json",
        "report.html",
        "lock",
    }
