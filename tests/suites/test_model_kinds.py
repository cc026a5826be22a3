"""Models that a suite takes for what they are not: refused before anything runs where config.json tells, else by a probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from harness.cell.training import model as models
from harness.cli import main
from harness.errors import AssetError, Exit
from harness.suites import loader
from support.model_folders import saved

SUITE = """\
suite: kinds
title: Of what kind is it?
sources:
  - {name: mine, kind: KIND, source: folder:mine}
matrix:
  - model: mine
    task: toy-sentiment
    method: full
    training: {steps: 2, batch: 2, lr: 1e-3, max_tokens: 16}
    evaluation: {items: 4, batch: 2}
"""
SMALL = {"vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}


def bert(kind: Any, **more: Any) -> Any:
    return kind(BertConfig(**SMALL, **more))


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2))


def plan(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    path = folder.parent / "kinds.yaml"
    path.write_text(SUITE.replace("KIND", kind), encoding="utf-8")
    capsys.readouterr()  # what saving the model has printed
    code = main(["plan", str(path)])
    return code, capsys.readouterr().err


@pytest.mark.nightly
def test_a_masked_language_model_is_no_causal_one(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(bert(BertForMaskedLM), tokenizer, tmp_path / "mine")
    code, said = plan(folder, "causal", capsys)
    assert code == Exit.USAGE
    assert "kinds.yaml:6: model mine is declared causal and is a masked language model (BertForMaskedLM)" in said
    assert str(folder / "config.json") in said
    assert "`kind: encoder`" in said
    code, said = plan(folder, "encoder", capsys)
    assert (code, "hint:" in said) == (Exit.PASS, False)


@pytest.mark.nightly
def test_a_masked_language_model_may_have_become_a_decoder(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(bert(BertForMaskedLM), tokenizer, tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    code, said = plan(folder, "causal", capsys)
    assert (code, "hint:" in said) == (Exit.PASS, False)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_an_encoder_decoder_is_neither(
    kind: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = plan(saved(t5(), tokenizer, tmp_path / "mine"), kind, capsys)
    assert code == Exit.USAGE
    assert "kinds.yaml:6: model mine is an encoder-decoder (t5)" in said
    assert "hint: name an encoder" in said


@pytest.mark.parametrize("config", ["[]", "{", '{"architectures": "BertForMaskedLM"}', '{"architectures": [null]}'])
def test_a_config_that_tells_nothing_is_left_to_the_cell(config: str, tokenizer: Path, tmp_path: Path) -> None:
    folder = saved(gpt2(), tokenizer, tmp_path / "mine")
    (folder / "config.json").write_text(config)
    (tmp_path / "kinds.yaml").write_text(SUITE.replace("KIND", "causal"), encoding="utf-8")
    assert loader.load(tmp_path / "kinds.yaml").entries


def load(folder: Path, dtype: torch.dtype) -> Any:
    return models.load(folder, "causal", 2, dtype, torch.device("cpu"), seed=0).model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_causal_class_that_looks_ahead_is_refused_as_it_is_loaded(
    dtype: torch.dtype, tokenizer: Path, tmp_path: Path
) -> None:
    folder = saved(bert(BertLMHeadModel), tokenizer, tmp_path / "mine")
    with pytest.raises(AssetError, match="BertLMHeadModel is configured as no causal model") as caught:
        load(folder, dtype)
    assert caught.value.where == str(folder)
    assert "`kind: encoder`" in caught.value.hint
    read = models.load(folder, "causal", 2, dtype, torch.device("cpu"), seed=0, check_causal=False)
    assert models.future_token_leakage(read.model) > 0  # loaded, as a Cell whose gate was passed before asks for it
    decoder = saved(bert(BertLMHeadModel, is_decoder=True), tokenizer, tmp_path / "decoder")
    assert models.future_token_leakage(load(decoder, dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [gpt2, lambda: LlamaForCausalLM(LlamaConfig(**SMALL))], ids=["gpt2", "llama"])
def test_causal_models_are_loaded_and_left_as_they_were(
    make: Any, dtype: torch.dtype, tokenizer: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = load(saved(make(), tokenizer, tmp_path / "mine"), dtype)
    assert models.future_token_leakage(model) == 0
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(("kind", "does"), [("causal", "predicts the next token"), ("encoder", "classifies texts")])
def test_what_reads_no_texts_is_neither(
    kind: str, does: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(gpt2(), tokenizer, tmp_path / "mine")
    (folder / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}')
    code, said = plan(folder, kind, capsys)
    assert code == Exit.USAGE
    assert (
        f"kinds.yaml:6: model mine has the type `vit`, and the installed transformers has no such class that {does}"
        in said
    )


def test_fit_refuses_what_a_suite_cannot_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for facts, says in (
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder (t5)"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "has the type `vit`"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(facts))
        assert main(["fit", str(tmp_path), "--memory", "1GiB"]) == Exit.USAGE
        said = capsys.readouterr().err
        assert f"{tmp_path / 'config.json'}: model {tmp_path} {says}" in said
        assert "hint: name a" in said
