"""`training.loop` of a suite: what trl cannot do is refused with its line, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.assets import generated, model_folder
from harness.cli import main, topics
from harness.errors import Exit
from harness.memory_model.plan_prediction import PlannedMemory
from harness.records.record import Training
from harness.report import plan_table
from harness.suites import loader
from support import recorded_run

SUITE = """\
suite: small
matrix:
  - model: tiny-llama
    task: toy-sentiment
    training: {steps: 4, batch: 2, lr: 1e-3, loop: [harness, trl]}
    evaluation: {items: 8, batch: 4}
    cells:
      - id: a
        method: lora
        config: {rank: 4, alpha: 8, targets: [q_proj]}
"""
LORA = "method: lora\n        config: {rank: 4, alpha: 8, targets: [q_proj]}"


def mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str = "", new: str = "") -> tuple[Exit, str]:
    assert old in SUITE
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE.replace(old, new), encoding="utf-8")
    code = main(["plan", str(file)])
    return Exit(code), capsys.readouterr().err


def test_the_loop_is_an_axis_of_training(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE, encoding="utf-8")
    cells = loader.load(file).plan.cells
    assert [cell.training.loop for cell in cells] == ["harness", "trl"]
    assert ["loop=trl" in cell.label for cell in cells] == [False, True]


def test_a_plan_marks_memory_that_lacks_activations(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE, encoding="utf-8")
    suite = loader.load(file)
    parts = dict.fromkeys(("weights_B", "adapter_B", "gradients_B", "optimizer_B", "step_B"), 2**20)
    ours, theirs = (cell.cell_id for cell in suite.plan.cells)
    predicted: dict[str, PlannedMemory | str] = {
        ours: PlannedMemory(**parts, activations_B=2**20, logits_B=None, peak_B=9 * 2**20, trainable=5),
        theirs: PlannedMemory(**parts, activations_B=None, logits_B=None, no_peak="only our own", trainable=5),
    }
    lines = plan_table.lines(plan_table.planning(suite, suite.plan, tmp_path, predicted))
    assert [("≥" in line) for line in lines if line.startswith(("  " + ours, "  " + theirs))] == [False, True]
    assert "≥: without activations, so the training needs more" in lines


def test_a_cell_of_the_harness_own_loop_keeps_its_id() -> None:
    cell = recorded_run.cells()["fused"]
    values = json.loads(cell.model_dump_json())
    del values["training"]["loop"]  # as in a Record of an older harness
    assert type(cell).model_validate(values).cell_id == cell.cell_id
    trl = cell.training.model_copy(update={"loop": "trl"})
    assert cell.model_copy(update={"training": trl}).cell_id != cell.cell_id


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("loop: [harness, trl]", "loop: tlr", "`loop` is 'tlr'"),
        ("loop: [harness, trl]", "loop: [trl, trl]", "`loop` lists 'trl' 2 times"),
        ("steps: 4", "steps: 0", "nothing is trained in 0 steps"),
        ("lr: 1e-3", "lr: 1e-3, layerwise: true", "`layerwise` is true"),
        ("lr: 1e-3", "lr: 1e-3, compile: true", "`compile` is true"),
        ("id: a", "id: a\n        dtype: float16", "dtype is float16"),
        ("id: a", "id: a\n        dtype: float64", "dtype is float64"),
        ("rank: 4", "rank: 4, dropout: 0.1", "`dropout` of lora is not 0"),
        ("[q_proj]", "[q_proj, lm_head]", "contain lm_head"),
        (
            LORA,
            "method: peft\n        implementation: hf-peft\n"
            "        config: {adapter_config: {peft_type: PROMPT_TUNING, num_virtual_tokens: 4, task_type: CAUSAL_LM}}",
            "PROMPT_TUNING puts tokens before every text",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused_with_its_line(
    old: str, new: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = mistakes(tmp_path, capsys, old, new)
    assert code == Exit.USAGE
    assert "suite.yaml:5: `loop`" in err
    assert said in err
    assert "hint:" in err


def test_an_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = "tiny-llama\n    task: toy-sentiment", "'shape:roberta-base'\n    task: synthetic"
    code, err = mistakes(tmp_path, capsys, old, new)
    assert code == Exit.USAGE
    assert "shape:roberta-base is an encoder" in err


def test_a_model_with_dropout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "with-dropout" / "config.json"
    config.parent.mkdir()
    generated.tiny_llama(config.parent)
    facts = json.loads(config.read_text(encoding="utf-8")) | {"attention_dropout": 0.1}
    config.write_text(json.dumps(facts), encoding="utf-8")
    code, err = mistakes(tmp_path, capsys, "model: tiny-llama", f"model: {config.parent}")
    assert code == Exit.USAGE
    assert "suite.yaml:5: `loop` is trl, but" in err
    assert "has dropout (`attention_dropout` of its config.json)" in err


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        (
            {"summary_first_dropout": 0.1, "classifier_dropout": 0.1, "token_dropout": True, "attention_dropout": 0.0},
            "",
        ),
        ({"resid_pdrop": 1}, "resid_pdrop"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob"),
        ({"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob"),
        ({"dropout_rate": 0.1}, "dropout_rate"),
        ({"text_config": {"attention_dropout": 0.1}}, "text_config.attention_dropout"),
    ],
)
def test_dropout_is_read_from_the_config(facts: dict[str, object], found: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    assert model_folder.dropout(tmp_path) == found


def test_explain_says_what_the_loop_is_and_that_dpo_is_not_offered() -> None:
    text = " ".join(topics.explain("loop").split())
    assert "training.loop" in text
    assert "SFTTrainer" in text
    assert "DPO and GRPO are not offered" in text
    assert "default: harness" in text
    assert Training(steps=1).loop == "harness"
