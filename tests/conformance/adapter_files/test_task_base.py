"""Adapters whose task is another one than that of the saved base: the class, the head and the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from harness.cli import main
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.errors import Exit, Unsupported, UsageError

pytestmark = pytest.mark.usefixtures("forks")
QV = ["q_proj", "v_proj"]
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    """Return the folder of a base that was saved as a causal model."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def saved(model: nn.Module, folder: Path, task: str, targets: list[str] = QV) -> Any:
    """Adapt a model with random values, save the adapter by peft, and return the PeftModel."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type=task, target_modules=targets))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return adapted.eval()


def judged(folder: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["check", str(folder), "--base-model", str(base), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "labels"), [("SEQ_CLS", 3), ("TOKEN_CLS", 5), ("SEQ_CLS", 2)])
def test_a_classifier_beside_a_causal_base(
    task: str, labels: int, causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = {"SEQ_CLS": "LlamaForSequenceClassification", "TOKEN_CLS": "LlamaForTokenClassification"}[task]
    model = getattr(transformers, name).from_pretrained(causal, num_labels=labels)
    theirs = saved(model, tmp_path / "a", task)
    code, found = judged(tmp_path / "a", causal, capsys)
    assert (code, found["base_class"], found["findings"]) == (Exit.PASS, name, [])
    adapter = AdapterFile.read(tmp_path / "a")
    truth, rounded = ({"logits": reference_logits(causal, adapter, [PROMPT], one)[0]} for one in
                      (torch.float64, torch.float32))  # fmt: skip
    have = {"logits": theirs(input_ids=torch.tensor([PROMPT])).logits[0].detach()}
    assert have["logits"].shape[-1] == labels
    assert noise_floor(have, truth, rounded, "float32").passed


@pytest.mark.slow
def test_a_classifier_without_its_head_is_a_finding(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(transformers.LlamaForSequenceClassification.from_pretrained(causal), tmp_path / "a", "SEQ_CLS")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: one for key, one in load_file(file).items() if ".score." not in key}, file)
    code, found = judged(tmp_path / "a", causal, capsys)
    assert code == Exit.FAIL
    assert [(one["kind"], one["where"]) for one in found["findings"]] == [("missing-module", "score.weight")]
    with pytest.raises(UsageError, match=r"no weights for score\.weight, which each load"):
        reference_logits(causal, AdapterFile.read(tmp_path / "a"), [PROMPT])


@pytest.mark.slow
def test_an_adapter_of_hidden_states(causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(transformers.LlamaModel.from_pretrained(causal), tmp_path / "a", "FEATURE_EXTRACTION")
    code, found = judged(tmp_path / "a", causal, capsys)
    assert (code, found["base_class"], found["findings"]) == (Exit.PASS, "LlamaModel", [])


def test_a_task_without_a_class_is_not_judged(causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(transformers.LlamaForCausalLM.from_pretrained(causal), tmp_path / "a", "CAUSAL_LM")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"task_type": "SEQ_CLS"}
    path.write_text(json.dumps(config), encoding="utf-8")
    transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    ).save_pretrained(tmp_path / "mamba")
    code, found = judged(tmp_path / "a", tmp_path / "mamba", capsys)
    assert (code, found["base_class"]) == (Exit.NOTHING_COMPARED, None)
    assert [(one["kind"], one["nonconforming"]) for one in found["findings"]] == [("not-compared", False)]
    with pytest.raises(Unsupported, match="no class for task_type SEQ_CLS and model_type mamba"):
        reference_logits(tmp_path / "mamba", AdapterFile.read(tmp_path / "a"), [PROMPT])


def test_a_base_with_only_a_pickle_is_one_message(causal: Path, tmp_path: Path) -> None:
    saved(transformers.LlamaForCausalLM.from_pretrained(causal), tmp_path / "a", "CAUSAL_LM")
    (causal / "model.safetensors").unlink()
    (causal / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UsageError, match="the weights of the base cannot be read") as caught:
        reference_logits(causal, AdapterFile.read(tmp_path / "a"), [PROMPT])
    assert caught.value.where == str(causal)
    assert "pickles are not read" in caught.value.hint
