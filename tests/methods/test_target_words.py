"""`targets: attention` and `targets: all-linear`: which layers of an architecture they stand for, for everybody alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from harness.assets import structure
from harness.conformance.subject import adaptable_layers, configure
from harness.memory_model import counting
from harness.methods.registry import discover
from harness.methods.spec import TARGET_WORDS, methods
from reference.shared.layers import KINDS, WORDS, targets

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
# kind, config, the last parts of what each word stands for
MODELS: dict[str, tuple[str, dict[str, Any], set[str], set[str]]] = {
    "llama": (
        "causal", {**SIZES, "num_key_value_heads": 1}, {"q_proj", "k_proj", "v_proj", "o_proj"},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "gpt2": ("causal", GPT2, {"c_attn", "attn.c_proj"}, {"c_attn", "c_proj", "c_fc"}),
    "gpt_neox": (
        "causal", SIZES, {"query_key_value", "dense"},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "bert": ("encoder", SIZES, {"query", "key", "value", "attention.output.dense"}, {"query", "key", "value", "dense"}),
    "roberta": ("encoder", SIZES, {"query", "key", "value", "attention.output.dense"}, {"query", "key", "value", "dense"}),
}  # fmt: skip


def build(name: str) -> Any:
    kind, config, _, _ = MODELS[name]
    return structure.build({"model_type": name, **config}, kind, torch.float32)


def test_suites_and_reference_have_the_same_words() -> None:
    assert WORDS.keys() == TARGET_WORDS


@pytest.mark.parametrize("name", MODELS)
def test_layers_selected_by_each_word(name: str) -> None:
    model = build(name)
    _, _, attention, everything = MODELS[name]
    found = {word: set(targets(model, [word], KINDS)) for word in TARGET_WORDS}
    for word, ends in (("attention", attention), ("all-linear", everything)):
        assert all(any(path.endswith(f".{end}") for path in found[word]) for end in ends)
        assert all(any(path.endswith(f".{end}") for end in ends) for path in found[word])
    assert found["attention"] < found["all-linear"]
    # Nothing of what gives the output, and all that is linear beside it.
    trunk = f"{model.base_model_prefix}."
    linear = {path for path, _ in model.named_modules() if path.startswith(trunk)} & set(targets_of_kind(model))
    assert found["all-linear"] == linear


def targets_of_kind(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def test_all_linear_selects_the_same_layers_as_in_peft() -> None:
    peft = pytest.importorskip("peft", reason="compares with peft")
    for name in ("llama", "gpt2"):
        model = build(name)
        theirs = peft.get_peft_model(
            build(name), peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=name == "gpt2")
        )
        taken = {path for path, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert taken == set(targets(model, ["all-linear"], KINDS))


@pytest.mark.parametrize("name", ["reference", "fused", "hf-peft"])
@pytest.mark.parametrize("word", sorted(TARGET_WORDS))
def test_every_implementation_takes_the_same_layers(name: str, word: str) -> None:
    with torch.device("cpu"):
        model = build("llama").to_empty(device="cpu")
    config = configure("lora", {"rank": 2, "targets": [word]})
    wanted = list(adaptable_layers(model, config))
    adapted = discover([name]).find("method", "lora", name)(model, config, torch.Generator().manual_seed(0))
    assert list(adapted.layers) == wanted


def test_fit_counts_the_same_layers() -> None:
    config = {"model_type": "llama", **MODELS["llama"][1]}
    lora = {"lora": [{"rank": 2}]}
    names = {word: counting.count(config, "causal", "float32", lora, [word]) for word in sorted(TARGET_WORDS)}
    default = counting.count(config, "causal", "float32", lora, [])
    trains = {word: counted["methods"]["lora"][0]["trainable"] for word, counted in names.items()}
    assert trains["all-linear"] == default["methods"]["lora"][0]["trainable"] > trains["attention"] > 0


def test_a_word_without_layers_or_with_unsupported_ones_is_rejected() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'attention' selects no layer of this Sequential: .* named \.\.\.Attention"):
        targets(plain, ["attention"])
    assert list(targets(plain, ["all-linear"])) == ["0"]
    with pytest.raises(ValueError, match="'all-linear' selects no layer of this ReLU"):
        targets(nn.ReLU(), ["all-linear"])
    with pytest.raises(ValueError, match=r"selects .*c_attn too, a Conv1D, which this method does not support"):
        targets(GPT2LMHeadModel(GPT2Config(**GPT2)), ["attention"])


def test_a_word_is_one_value_however_it_is_written() -> None:
    knob = methods()["lora"].fields["targets"]
    assert not knob.problem("attention")
    assert knob.canonical("attention") == knob.canonical(["attention"]) == ["attention"]
    assert knob.problem("atention") == "must be a list of words, got 'atention'"
    assert "all-linear or attention" in knob.hint
    assert list(knob.problems("atention")) == [((), knob.problem("atention"), "did you mean `attention`?")]
    assert list(knob.problems("query")) == [((), knob.problem("query"), knob.hint)]
