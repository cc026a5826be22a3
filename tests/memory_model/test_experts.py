"""Experts, which no word for linear layers and no base in 4 bits reaches: `plan`, `fit` and the Record say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from harness.analysis.run_facts import analyse
from harness.assets import structure
from harness.cell.measure.memory import model_tensors, tensor_bytes
from harness.cell.training.offloaded_weights import release, unused
from harness.cli import main
from harness.conformance.subject import adaptable_layers, configure
from harness.memory_model import counting, dry_step, isolated_step, plan_prediction
from harness.memory_model.ledger import OWN
from harness.methods import experts
from harness.methods.registry import discover
from harness.records.record import Base, Cell, Record
from harness.report import plan_table, terminal
from harness.suites import loader
from support import recorded_run

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "architectures": ["MixtralForCausalLM"],
}  # fmt: skip
STACKED = 2 * 4 * (2 * 48 * 32 + 32 * 48)  # blocks, experts, gate and up, down
UNPACKABLE = "`targets` name model.layers.0.mlp.experts (MixtralExperts); a 4-bit base packs linear layers only"
SAID = f"the experts are stacked weights and no linear layers: {STACKED:,} of "

pytestmark = pytest.mark.usefixtures("forks")


def built() -> Any:
    return structure.build(MIXTRAL, "causal", torch.float32).requires_grad_(False)


def cell(**facts: Any) -> Cell:
    one = next(c for c in recorded_run.cells().values() if c.method == "lora")
    return one.model_copy(update=facts)


def test_experts_are_counted_until_they_train_or_are_wrapped() -> None:
    model = built()
    assert experts.untouched(model) == STACKED
    assert experts.untouched(model.requires_grad_(True)) == 0
    keys = {
        "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }  # fmt: skip
    real = MixtralForCausalLM(MixtralConfig(**{k: v for k, v in MIXTRAL.items() if k != "model_type"}))
    assert experts.untouched(real.requires_grad_(False)) == STACKED
    attach = discover().find("method", "peft", "hf-peft")
    attach(real, configure("peft", {"adapter_config": keys}), torch.Generator())
    assert experts.untouched(real) == 0
    llama = structure.build(MIXTRAL | {"model_type": "llama"}, "causal", torch.float32)
    assert experts.untouched(llama.requires_grad_(False)) == 0


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"config": {"targets": ["all-linear"]}}, True),
        ({"config": {"targets": ["attention"]}}, False),
        ({"config": {"adapter_config": {"target_modules": "all-linear"}}}, True),
        ({"config": {"adapter_config": {"target_modules": ["q_proj"]}}}, False),
        ({"config": {}, "method": "frozen"}, False),
        ({"config": {}, "method": "frozen", "base": Base(quantization="nf4", implementation="fused")}, True),
    ],
    ids=str,
)
def test_a_record_says_it_of_cells_that_mean_all_layers(facts: dict[str, Any], says: bool) -> None:
    notes = experts.notes(cell(**facts), built(), 50_000)
    assert notes == ([f"{SAID}50,000 weights (74%) are neither adapted nor packed into 4 bits; LoRA and QLoRA "
                      "adapt them by `targets: [all-linear, experts]`"] if says else [])  # fmt: skip


def test_it_is_at_the_end_of_a_run(tmp_path: Path) -> None:
    note = experts.note(STACKED, 50_000)

    def noted(_: str, old: Record) -> Record:
        return old.model_copy(update={"notes": ["of no matter", note]})

    lines = terminal.summary(analyse(recorded_run.write_run(tmp_path / "run", change=noted, only=["fused"])))
    (line,) = (line for line in lines if SAID in line)
    assert line.startswith(f"! {note}: ")
    assert not any("of no matter" in line for line in lines)


def folder(path: Path) -> Path:
    MixtralForCausalLM(MixtralConfig(**{k: v for k, v in MIXTRAL.items() if k != "model_type"})).save_pretrained(path)
    return path


@pytest.mark.slow
def test_fit_says_it_of_the_methods_that_leave_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", str(folder(tmp_path)), "--memory", "1GiB", "--formulas"]
    words += [word for name in ("lora", "qlora", "full") for word in ("--method", name)]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["method"]: bool(row["untouched"]) for row in rows} == {"lora": True, "qlora": True, "full": False}
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert SAID in said
    assert "LoRA and QLoRA adapt them by `--target all-linear --target experts`" in said
    assert main([*words, "--target", "q_proj"]) == 0
    assert SAID not in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("targets", [["all-linear", "experts"], ["experts"]], ids=str)
def test_weights_of_packed_experts_are_predicted_as_a_cell_counts_them(targets: list[str]) -> None:
    counted = counting.count(MIXTRAL, "causal", "float32", {"qlora": [{"rank": 2, "targets": targets}]}, [])
    (one,) = counted["methods"]["qlora"]
    real: Any = MixtralForCausalLM(MixtralConfig(**{k: v for k, v in MIXTRAL.items() if k != "model_type"}))
    config = configure("qlora", {"rank": 2, "targets": targets})
    bases = adaptable_layers(real, config)
    adapted = discover().find("method", "qlora", "fused")(real, config, torch.Generator())
    release(unused("qlora", adapted, bases))
    adds = {id(t) for t in adapted.tensors().values()}
    assert one["weights"] == {OWN: tensor_bytes(t for t in model_tensors(real) if id(t) not in adds)}


def test_fit_leaves_out_bases_that_pack_no_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    words = ["fit", str(tmp_path), "--memory", "1GiB", "--formulas", "--json", "--method", "lora", "--rank", "2"]
    words += ["--target", "all-linear", "--target", "experts"]
    assert main(words) == 0
    assert [row["base"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["none"]
    assert main([*words, "--base", "nf4"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["because"] == UNPACKABLE


def test_plan_says_that_a_base_packs_no_experts() -> None:
    one = cell(config={"rank": 2, "targets": ["experts"]}, base=Base(quantization="nf4", implementation="fused"))
    counted = counting.answer(plan_prediction.count_request(one, MIXTRAL, "causal", 0))
    assert plan_prediction.prediction(one, counted) == UNPACKABLE
    parts = dry_step.longest_batches(one, "causal", 1)
    assert isolated_step.peak(one, MIXTRAL, "causal", parts) == {"no_peak": UNPACKABLE}


@pytest.mark.parametrize("words", [["explain", "experts"], ["fit", "--help"]], ids=str)
def test_help_names_the_target_of_experts(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "`all-linear`" in said
    assert "stacked weights of a mixture" in " ".join(said.split())


@pytest.mark.slow
def test_plan_says_it(tmp_path: Path) -> None:
    (tmp_path / "moe.json").write_text(json.dumps(MIXTRAL))
    (tmp_path / "suite.yaml").write_text("""\
suite: moe
sources:
  - {name: moe, kind: causal, source: "shape:./moe.json"}
matrix:
  - task: synthetic
    model: moe
    method: lora
    implementation: reference
    training: {steps: 0}
    cells:
      - {id: all, config: {rank: 2, targets: all-linear}}
      - {id: some, config: {rank: 2, targets: [q_proj]}}
""")
    suite = loader.load(str(tmp_path / "suite.yaml"))
    plan = suite.plan
    said = "\n".join(
        plan_table.lines(plan_table.planning(suite, plan, tmp_path / "none", plan_table.predictions(suite, plan)))
    ).splitlines()
    (line,) = (line for line in said if SAID in line)
    assert line.startswith("of 1 Cell: ")
