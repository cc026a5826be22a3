"""The classification head of an encoder from a folder: where it starts, and that it trains whatever the Method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
)

from harness.cell.training import model as models
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER
from harness.errors import AssetError
from harness.records.record import Predicted, Status
from harness.report import plan_table
from harness.suites import loader
from support.model_folders import saved
from support.sandbox import ForkSandbox

SMALL = {"vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
SUITE = """\
suite: heads
title: Heads of encoders
sources:
  - {name: mine, kind: encoder, source: "folder:./mine"}
matrix:
  - model: mine
    task: toy-sentiment
    training: {steps: 4, batch: 4, warmup: 1, max_tokens: 24, lr: 5e-3}
    evaluation: {items: 8, batch: 8}
    latency: never
    cells:
"""
LORA = {"r": 4, "target_modules": ["q_lin", "v_lin"]}
CPU = torch.device("cpu")


def load(folder: Path, seed: int = 0, labels: int = 2, dtype: torch.dtype = torch.float32) -> models.Loaded:
    return models.load(folder, "encoder", labels, dtype, CPU, seed)


def modernbert() -> Any:
    return ModernBertModel(ModernBertConfig(**SMALL, **TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_a_new_head_starts_at_one_and_lets_gradients_through(
    dtype: torch.dtype, tokenizer: Path, tmp_path: Path
) -> None:
    loaded = load(saved(modernbert(), tokenizer, tmp_path / "mine"), dtype=dtype)
    assert [*loaded.head] == ["classifier.bias", "classifier.weight", "head.dense.weight", "head.norm.weight"]
    assert bool((loaded.head["head.norm.weight"] == 1).all())
    texts = torch.tensor([[3, 5, 28, 9], [7, 8, 9, 3]])
    logits = loaded.model(input_ids=texts).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(bool(parameter.grad.any()) for parameter in loaded.head.values())
    assert bool(loaded.model.get_input_embeddings().weight.grad.any())


def test_a_new_linear_head_is_drawn_from_the_seed_alone(tokenizer: Path, tmp_path: Path) -> None:
    folder = saved(BertModel(BertConfig(**SMALL)), tokenizer, tmp_path / "mine")
    heads = [load(folder, seed).head for seed in (1, 1, 2)]
    # The published Records start from these numbers.
    drawn = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.02
    assert torch.equal(heads[0]["classifier.weight"], drawn.float())
    assert torch.equal(heads[1]["classifier.weight"], drawn.float())
    assert not torch.equal(heads[2]["classifier.weight"], drawn.float())
    assert not heads[0]["classifier.bias"].any()


def distilbert(labels: int = 2) -> Any:
    torch.manual_seed(0)
    small = {"vocab_size": 60, "dim": 8, "hidden_dim": 8, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
    return DistilBertForSequenceClassification(DistilBertConfig(**small, num_labels=labels))


def test_a_head_of_the_checkpoint_is_kept_as_it_is_and_noted(tokenizer: Path, tmp_path: Path) -> None:
    model = distilbert()
    loaded = load(saved(model, tokenizer, tmp_path / "mine"))
    assert [*loaded.head] == [f"{layer}.{p}" for layer in ("classifier", "pre_classifier") for p in ("bias", "weight")]
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in loaded.head.items())
    (note,) = loaded.notes
    assert "classifier.weight" in note
    assert "from the checkpoint" in note


@pytest.mark.nightly
def test_a_head_of_the_checkpoint_trains_with_every_method_as_with_peft_itself(
    tokenizer: Path, fork_sandbox: ForkSandbox, tmp_path: Path
) -> None:
    folder = saved(distilbert(), tokenizer, tmp_path / "mine")
    stock = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(folder), LoraConfig(**LORA, task_type="SEQ_CLS")
    )
    stock.save_pretrained(tmp_path / "adapter")
    cells = (
        "{id: frozen, method: frozen, implementation: reference}",
        "{id: full, method: full, implementation: reference}",
        "{id: lora, method: lora, implementation: fused, config: {rank: 4, targets: [q_lin, v_lin]}}",
        "{id: dropped-in, method: peft, implementation: hf-peft, config: {adapter_config: ./adapter}}",
    )
    suite = tmp_path / "heads.yaml"
    suite.write_text(SUITE + "".join(f"      - {cell}\n" for cell in cells), encoding="utf-8")
    finished = fork_sandbox.command("run", str(suite), "--out", "run")
    records = {record.cell.method: record for record in fork_sandbox.read().records}
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, Status.OK), finished.err
    counts = {name: record.measurements.parameters for name, record in records.items() if record.measurements}
    head = sum(p.numel() for name, p in stock.named_parameters() if "modules_to_save" in name)
    assert {name: count.head for name, count in counts.items()} == dict.fromkeys(records, head)
    assert counts["frozen"].trainable == head
    assert counts["lora"].trainable == counts["peft"].trainable == stock.get_nb_trainable_parameters()[0]
    assert all("from the checkpoint" in " ".join(record.notes) for record in records.values())


@pytest.mark.nightly
def test_what_a_checkpoint_lacks_of_the_encoder_trains_with_the_head_and_is_predicted(
    tokenizer: Path, fork_sandbox: ForkSandbox, tmp_path: Path
) -> None:
    small = {**SMALL, "hidden_size": 64, "intermediate_size": 64}
    folder = saved(BertForMaskedLM(BertConfig(**small)), tokenizer, tmp_path / "mine")
    pooler = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert [*load(folder).head] == [*pooler, "classifier.bias", "classifier.weight"]
    (note,) = load(folder).notes
    assert all(name in note for name in pooler)
    assert "classifier" not in note
    lora = "method: lora, implementation: fused, config: {rank: 4, targets:"
    path = tmp_path / "heads.yaml"
    cells = f"      - {{id: all, {lora} all-linear}}}}\n      - {{id: named, {lora} [dense]}}}}\n"  # the pooler's too
    path.write_text(SUITE + cells, encoding="utf-8")
    finished = fork_sandbox.command("run", str(path), "--out", "run")
    suite = loader.load(path)
    planned = plan_table.predictions(suite, suite.plan)
    for record in fork_sandbox.read().records:
        assert record.measurements is not None, finished.err
        assert record.measurements.parameters.head == 64 * 64 + 64 + 2 * 64 + 2
        memory, before = record.measurements.memory, planned[record.cell_id]
        expected = memory.predicted
        assert expected is not None
        assert isinstance(before, Predicted)
        assert expected.peak_B is not None
        assert memory.counted_peak_B is not None
        for found in (expected, before):
            assert (found.adapter_B, found.gradients_B) == (memory.adapter_B, memory.gradients_B)
            assert abs(found.optimizer_B - memory.optimizer_B) <= FOOTPRINT_LEDGER * memory.optimizer_B
            assert abs(found.weights_B - memory.weights_B) <= FOOTPRINT_LEDGER * memory.weights_B
        assert abs(expected.peak_B - memory.counted_peak_B) <= FOOTPRINT_LEDGER * memory.counted_peak_B


def test_a_head_of_another_number_of_classes_is_drawn_anew_and_noted(tokenizer: Path, tmp_path: Path) -> None:
    model = distilbert(labels=3)
    loaded = load(saved(model, tokenizer, tmp_path / "mine"), seed=1)
    drawn = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.02
    assert torch.equal(loaded.head["classifier.weight"], drawn.float())
    assert not loaded.head["classifier.bias"].any()
    assert torch.equal(loaded.head["pre_classifier.weight"], model.pre_classifier.weight)
    anew, kept = loaded.notes
    assert "does not have 2 classes: classifier.bias, classifier.weight initialised at random" in anew
    assert "pre_classifier.bias from the checkpoint" in kept


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_weights_of_other_sizes_than_the_config_says_are_refused(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    model = distilbert() if kind == "encoder" else LlamaForCausalLM(LlamaConfig(**SMALL))
    folder = saved(model, tokenizer, tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 61}))
    with pytest.raises(AssetError, match=r"\.weight has the shape \(60, 8\), and \(61, 8\) in the config") as caught:
        models.load(folder, kind, 2, torch.float32, CPU, seed=0)
    assert caught.value.where == str(folder)
    assert "correct config.json" in caught.value.hint
