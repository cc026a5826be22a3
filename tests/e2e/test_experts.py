"""LoRA on the experts of tiny mixtures of experts: three implementations go through Cells, and compute one training run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from harness.errors import Exit
from harness.records.record import Outcome
from harness.resources import data_folder
from support.sandbox import ForkSandbox

_SUITE = """
suite: experts
title: Experts
about: For tests.
matrix:
  - model: ./model
    task: synthetic
    method: lora
    training: {steps: 6, batch: 2, max_tokens: 8, lr: 5e-3}
    latency: never
    config: {rank: 3, alpha: 8, targets: [q_proj, experts]}
    cells:
      - {id: experts, implementation: [reference, fused, hf-peft]}
      - {id: exact, implementation: reference, dtype: float64}
comparisons:
  - {same-losses: experts, as: exact, says: three implementations compute one run}
"""


def _model(shape: str, folder: Path) -> None:
    """Save a model of random weights and a tokenizer, so that a Cell of any dtype starts from the same weights."""
    keys = json.loads((data_folder("suites") / f"{shape}.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>").save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny-mixtral", pytest.param("tiny-qwen-moe", marks=pytest.mark.nightly)])
def test_three_implementations_have_the_losses_of_float64(shape: str, fork_sandbox: ForkSandbox) -> None:
    _model(shape, fork_sandbox.folder / "model")
    (fork_sandbox.folder / "experts.yaml").write_text(_SUITE)
    finished = fork_sandbox.command("run", "experts.yaml", "--out", "run")
    assert finished.code == Exit.PASS, finished.out + finished.err
    assert "pass: three implementations compute one run" in finished.out
    for record in fork_sandbox.read().records:
        experts = [path for path in record.layers if path.endswith(".experts")]
        assert len(experts) == 2
        assert not [note for note in record.notes if "neither adapted" in note]
        judged = {check.check.split("/")[1]: check.outcome for check in record.checks}
        assert {judged[name] for name in ("forward", "gradient", "merge", "moved", "frozen")} == {Outcome.PASS}
