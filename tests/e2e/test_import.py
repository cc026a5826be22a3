"""`import`: the Cell of a finished training, its checks, its warning, and its row beside a Cell that the harness trained."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from safetensors.torch import load_file, save_file

from harness.analysis.run_facts import analyse
from harness.assets import generated
from harness.errors import Exit
from harness.records import store
from harness.records.record import Outcome, Record
from harness.report import html
from support import finished_runs
from support.sandbox import ForkSandbox

pytestmark = pytest.mark.e2e

SFT_TRAINING = Path(finished_runs.__file__).with_name("sft_training.py")
SUITE = """
suite: twin
matrix:
  - id: lora
    model: tiny-llama
    task: toy-sentiment
    method: lora
    implementation: hf-peft
    training: {steps: 4, batch: 8, max_tokens: 24, lr: 5e-3}
    evaluation: {items: 32, batch: 16}
    latency: never
    config: {rank: 4, alpha: 8, targets: [q_proj, v_proj]}
"""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return a folder in trl's layout with an adapter for the tiny Llama."""
    generated.tiny_llama(base := tmp_path / "base")
    return finished_runs.trl(tmp_path / "finished", base)


def imported(run: store.Run) -> Record:
    (record,) = [record for record in run.records if record.imported]
    return record


def test_an_imported_adapter_is_judged_evaluated_and_marked(fork_sandbox: ForkSandbox, finished: Path) -> None:
    scored = ("--task", "toy-sentiment", "--items", "32", "--max-tokens", "24")
    done = fork_sandbox.command("import", str(finished), *scored, "--out", "run")
    assert done.code == Exit.PASS, done.err + done.out
    record = imported(fork_sandbox.read())
    m = record.measurements
    assert m is not None
    assert m.training is None
    assert m.accuracy is not None
    assert m.parameters.adapter == sum(t.numel() for t in load_file(finished / "adapter_model.safetensors").values())
    assert {x.variant for x in m.latency if x.seconds} == {"base", "unmerged", "merged"}
    passed = {c.check for c in record.checks if c.outcome is Outcome.PASS}
    assert {"adapter_files/logits/float32/trained", "peft/logits/float32/trained"} <= passed
    assert record.imported is not None
    assert [entry.loss for entry in record.imported.logged] == list(finished_runs.LOSSES)
    # The log of the fixture says that the loss fell to 3; the tensors of the fixture are random, as good as none.
    assert record.imported.loss is not None
    assert record.imported.loss.evaluated is not None
    assert record.imported.loss.highest == max(finished_runs.LOSSES[2:])
    assert "Warning: the loss of this adapter" in done.out
    assert "ok, imported, but its loss is not that of its log" in done.out


@pytest.mark.parametrize("program", [name for name in finished_runs.LAYOUTS if name != "trl"])
def test_the_folders_of_the_other_programs_are_imported(
    fork_sandbox: ForkSandbox, finished: Path, tmp_path: Path, program: str
) -> None:
    folder = finished_runs.LAYOUTS[program](tmp_path / "other", tmp_path / "base")
    done = fork_sandbox.command("import", str(folder), "--out", "run")
    assert done.code == Exit.PASS, done.err + done.out
    record = imported(fork_sandbox.read())
    assert record.imported is not None
    assert record.imported.tool == program
    assert record.imported.loss is not None
    assert "--task" in record.imported.loss.because
    assert record.measurements is not None
    assert [c.outcome for c in record.checks if c.id.check == "logits"] == [Outcome.PASS] * 2


def test_an_imported_cell_stands_in_one_table_with_a_trained_one(fork_sandbox: ForkSandbox, finished: Path) -> None:
    (fork_sandbox.folder / "twin.yaml").write_text(SUITE, encoding="utf-8")
    done = fork_sandbox.command("import", str(finished), "--beside", "twin.yaml", "--out", "run")
    assert done.code == Exit.PASS, done.err + done.out
    run = fork_sandbox.read()
    trained = next(record for record in run.records if not record.imported)
    mine = imported(run)
    assert mine.cell.evaluation.items == trained.cell.evaluation.items
    assert mine.accuracy is not None
    assert trained.accuracy is not None
    assert mine.accuracy.answers.keys() == trained.accuracy.answers.keys()
    html.write_report([analyse(run)], page := fork_sandbox.folder / "page.html")
    text = page.read_text(encoding="utf-8")
    assert "ok, imported" in text
    assert "not known of the imported training: the log does not have it" in text  # in the place of the peak
    assert "as its program logged it" in text  # the chart of losses


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="an optional dependency: pip install trl")
def test_the_folder_of_a_real_sfttrainer_stands_beside_the_same_recipe(
    fork_sandbox: ForkSandbox, tmp_path: Path
) -> None:
    generated.tiny_llama(base := tmp_path / "base")
    generated.toy_sentiment(tmp_path)
    folder = tmp_path / "sft"
    script = [sys.executable, str(SFT_TRAINING), str(base), str(tmp_path / "rows.jsonl"), str(folder)]
    trained = subprocess.run(script, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    (fork_sandbox.folder / "twin.yaml").write_text(SUITE.replace("steps: 4", "steps: 40"), encoding="utf-8")
    done = fork_sandbox.command("import", str(folder), "--beside", "twin.yaml", "--out", "run")
    assert done.code == Exit.PASS, done.err + done.out
    assert "its loss is not that of its log" not in done.out
    run = fork_sandbox.read()
    mine, twin = imported(run), next(record for record in run.records if not record.imported)
    assert mine.imported is not None
    assert mine.imported.tool == "trl"
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [(one.step, one.loss) for one in mine.imported.logged] == [
        (x["step"], x["loss"]) for x in log if "loss" in x
    ]
    assert mine.measurements is not None
    assert twin.measurements is not None
    assert mine.measurements.parameters.adapter == twin.measurements.parameters.adapter
    assert twin.measurements.training is not None
    assert mine.imported.loss is not None
    last = fmean(twin.measurements.training.losses[-10:])
    assert abs(last - mine.imported.logged[-1].loss) < mine.imported.loss.margin


def test_without_a_reference_no_time_is_shown(fork_sandbox: ForkSandbox, finished: Path, tmp_path: Path) -> None:
    finished_runs.adapter(finished, tmp_path / "base", init_lora_weights="olora")
    done = fork_sandbox.command("import", str(finished), "--out", "run")
    assert done.code == Exit.PASS, done.err + done.out
    assert "no speed without parity: the reference does not implement this adapter file" in done.out


def test_a_cell_has_the_id_of_its_tensors(fork_sandbox: ForkSandbox, finished: Path) -> None:
    """The Cell of another adapter with the same config is another Cell."""
    file = finished / "checkpoint-20" / "adapter_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file)
    ids = set()
    for number in ("20", "40"):
        done = fork_sandbox.command("import", str(finished), "--checkpoint", number, "--out", f"run-{number}")
        assert done.code == Exit.PASS, done.err + done.out
        ids.add(imported(store.read_run(fork_sandbox.folder / f"run-{number}")).cell_id)
    assert len(ids) == 2
