"""Right files that HF peft writes and that once counted as wrong: no finding, and the weights that peft computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.findings import judge
from harness.conformance.adapter_files.loader_readings import features, verdicts
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.methods.base_model import empty_base
from reference.adapter_file import AdapterSettings, apply

QV = ["q_proj", "v_proj"]
SIZES = {
    "vocab_size": 32, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def saved(model: nn.Module, folder: Path, embeddings: bool | str = "auto", **config: Any) -> Path:
    """Adapt a model with random values, save the adapter by peft, and return the folder."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **config))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return the folder of a base without biases."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def kinds(folder: Path, base: Path | None) -> list[str]:
    return [one.kind for one in judge(AdapterFile.read(folder), None if base is None else empty_base(base))]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias_of_a_base_without_biases(bias: str, llama: Path, tmp_path: Path) -> None:
    folder = saved(loaded(llama), tmp_path / "a", target_modules=QV, bias=bias)
    assert kinds(folder, llama) == kinds(folder, None) == []


def test_a_missing_bias_of_a_base_with_biases_is_a_finding(llama: Path, tmp_path: Path) -> None:
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attention_bias=True))
    base.save_pretrained(llama)
    folder = saved(base, tmp_path / "a", target_modules=QV, bias="lora_only")
    assert kinds(folder, llama) == []
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if key.endswith(".base_layer.bias")))
    save_file(tensors, folder / "adapter_model.safetensors")
    assert kinds(folder, llama) == ["bias"]


def test_saved_embeddings_that_no_setting_names(llama: Path, tmp_path: Path) -> None:
    folder = saved(loaded(llama), tmp_path / "a", embeddings=True, target_modules=QV)
    adapter = AdapterFile.read(folder)
    assert sum("lora_" not in key for key in adapter.header) == 2
    assert kinds(folder, llama) == []
    readings = {one.loader: one for one in verdicts(features(adapter))}
    assert readings["vLLM"].verdict == readings["llama.cpp (convert_lora_to_gguf.py)"].verdict == "refused"


def test_resized_embeddings_are_a_note_if_the_file_has_all_of_them(llama: Path, tmp_path: Path) -> None:
    model = loaded(llama)
    model.resize_token_embeddings(40)
    folder = saved(model, tmp_path / "a", embeddings=True, target_modules=QV)
    (found,) = judge(AdapterFile.read(folder), empty_base(llama))
    assert (found.kind, found.nonconforming) == ("resized", False)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    assert kinds(folder, llama) == ["vocabulary"]


def test_the_bias_of_a_saved_head(tmp_path: Path) -> None:
    base = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES))
    base.save_pretrained(tmp_path / "phi")
    folder = saved(base, tmp_path / "a", embeddings=True, target_modules=[*QV, "lm_head"])
    assert any(key.endswith(".lm_head.base_layer.bias") for key in AdapterFile.read(folder).header)
    assert kinds(folder, tmp_path / "phi") == []


def test_copies_of_biases_that_peft_ignores(tmp_path: Path) -> None:
    config = transformers.BertConfig(**{key: SIZES[key] for key in list(SIZES)[:-1]})
    base = transformers.BertForSequenceClassification(config)
    base.save_pretrained(tmp_path / "bert")
    folder = saved(base, tmp_path / "a", target_modules=["query"], bias="all", task_type="SEQ_CLS")
    assert any(".original_module." in key for key in AdapterFile.read(folder).header)
    assert kinds(folder, tmp_path / "bert") == []


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_has_the_weights_that_peft_computes(kind: Any, config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sides = {nn.Conv1d: (3,), nn.Conv2d: (3, 2), nn.Conv3d: (3, 2, 1)}[kind]
    base = nn.Sequential(kind(3, 8, sides, stride=2, padding=1), nn.ReLU(), kind(8, 4, 1))
    inputs = torch.randn(2, 3, *[9] * len(sides))
    folder = saved(copy.deepcopy(base), tmp_path / "a", target_modules=["0", "2"], **config)
    adapter = AdapterFile.read(folder)
    assert judge(adapter, base) == judge(adapter) == []

    def reference(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(base).to(dtype)
        apply(model, AdapterSettings.of(adapter.config), adapter.tensors())
        return {"outputs": model(inputs.to(dtype)).detach()}

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    have = {"outputs": theirs(inputs).detach()}
    truth = reference(torch.float64)
    assert noise_floor(have, truth, reference(torch.float32), "float32").passed
    assert not noise_floor({"outputs": base(inputs).detach()}, truth, reference(torch.float32), "float32").passed


def test_a_layer_without_a_reference_is_not_judged(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, groups=2), nn.Linear(4, 4))
    folder = saved(copy.deepcopy(base), tmp_path / "a", target_modules=["0", "1"])
    found = judge(AdapterFile.read(folder), base)
    assert {(one.kind, one.nonconforming) for one in found} == {("not-judged", False)}
    assert {one.message.split()[4] for one in found} == {"Conv2d,", "Conv1d,"}


@pytest.mark.parametrize(
    ("config", "ok"),
    [
        ({"use_qalora": True}, {"hf-peft 0.21.2"}),
        ({"init_lora_weights": "pissa"}, {"hf-peft 0.21.2"}),
        ({"alora_invocation_tokens": [5]}, {"hf-peft 0.21.2", "llama.cpp (convert_lora_to_gguf.py)"}),
    ],
    ids=["use_qalora", "init_lora_weights", "alora_invocation_tokens"],
)
def test_no_loader_is_said_to_read_what_it_ignores(
    config: dict[str, Any], ok: set[str], llama: Path, tmp_path: Path
) -> None:
    folder = saved(loaded(llama), tmp_path / "a", target_modules=QV)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    adapter = AdapterFile.read(folder)
    found = list(verdicts(features(adapter, judge(adapter))))
    assert {one.loader for one in found if one.verdict == "ok"} == ok
    assert all(one.because for one in found if one.feature in ("unsupported", "activated") and one.verdict == "wrong")
